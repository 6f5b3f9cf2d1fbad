// Starts a PLC directory and a PDS on loopback, says where they are, and exits when stdin closes.
//
//   node serve.mjs '{"installation": "/dir/with/node_modules", "publicPort": 1234}'
//
// The PDS is told that it lives at http://localhost:<publicPort>, where the reverse proxy of the tests listens; it really
// listens on a port of its own, which the first line on stdout tells: {"pds": ..., "plc": ..., "upstream": ...}.
// Afterwards each line on stdin is a request, each line on stdout its answer:
//   {"cmd": "tokenLifetime", "seconds": 3600}   how long the access tokens live that are issued from now on

import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { pathToFileURL } from 'node:url'

const { installation, publicPort } = JSON.parse(process.argv[2])
// The packages are installed outside of this source tree, where an import statement would not look.
const require = createRequire(join(installation, 'package.json'))
const load = (name) => import(pathToFileURL(require.resolve(name)))

const { PDS } = await load('@atproto/pds')
const { Database, PlcServer } = require('@did-plc/server')

const listen = async (app) => {
  const server = app.listen(0, '127.0.0.1')
  await once(server, 'listening')
  return server.address().port
}
const secret = () => randomBytes(32).toString('hex')
const answer = (value) => process.stdout.write(JSON.stringify(value) + '\n')

const plc = `http://localhost:${await listen(PlcServer.create({ db: Database.mock() }).app)}`

const dataDirectory = await mkdtemp(join(tmpdir(), 'atproto-session-pds-'))
const pds = await PDS.fromEnv({
  devMode: true,
  hostname: 'localhost',
  port: publicPort,
  didPlcUrl: plc,
  dataDirectory,
  blobstoreDiskLocation: join(dataDirectory, 'blobs'),
  inviteRequired: false,
  rateLimitsEnabled: false,
  crawlers: [],
  jwtSecret: secret(),
  dpopSecret: secret(),
  adminPassword: secret(),
  plcRotationKeyK256PrivateKeyHex: secret(),
})
// What pds.start() does, except that it would listen on the public port, and on every interface.
await pds.ctx.sequencer.start()
const upstream = `http://127.0.0.1:${await listen(pds.app)}`

answer({ pds: `http://localhost:${publicPort}`, plc, upstream })

const commands = {
  tokenLifetime({ seconds }) {
    const { tokenManager } = pds.ctx.oauthProvider
    const before = tokenManager.tokenMaxAge / 1000
    tokenManager.tokenMaxAge = seconds * 1000
    return { before }
  },
}
for await (const line of createInterface({ input: process.stdin })) {
  const { cmd, ...args } = JSON.parse(line)
  answer(commands[cmd](args))
}

await rm(dataDirectory, { recursive: true, force: true })
process.exit(0)
