// Starts a PLC directory and a PDS on loopback, says where they are, and exits when stdin closes.
//
//   node serve.mjs '{"installation": "/dir/with/node_modules", "publicPort": 1234}'
//
// The PDS is told that it lives at http://localhost:<publicPort>, where the reverse proxy of the tests listens; it really
// listens on a port of its own, which the first line on stdout tells: {"pds": ..., "plc": ..., "upstream": ...}.
// Afterwards each line on stdin is a request, each line on stdout its answer:
//   {"cmd": "tokenLifetime", "seconds": 3600}   how long the access tokens live that are issued from now on
//   {"cmd": "route", "host": "app.example.net", "port": 1234}   https://app.example.net is at that port of this machine
//   {"cmd": "forget", "urls": [...]}   client metadata and keys are fetched anew, as ten minutes after they were
//   {"cmd": "age", "did": "...", "begun": 60, "refreshed": 30}   so many seconds ago, for the account's sessions

import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import tls from 'node:tls'
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

// A client_id has no port and a host name that looks public, so the PDS wants to connect to port 443 of a machine that does
// not exist. To listen there, and to give it a name, takes root; so the connection is turned elsewhere. What goes over it
// stays the same: the certificate is verified for the host that was asked for.
const routes = new Map()
const connect = tls.connect
tls.connect = (options, ...rest) => {
  const port = routes.get(options.host)
  return connect(port === undefined ? options : { ...options, host: '127.0.0.1', port }, ...rest)
}

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
  route({ host, port }) {
    routes.set(host, port)
    return {}
  },
  async forget({ urls }) {
    const { metadataGetter, jwks } = pds.ctx.oauthProvider.clientManager
    for (const url of urls) await Promise.all([metadataGetter.delStored(url), jwks.delStored(url)])
    return {}
  },
  async age({ did, begun, refreshed }) {
    const ago = (seconds) => new Date(Date.now() - seconds * 1000).toISOString()
    const { db } = pds.ctx.accountManager.db
    const times = { createdAt: ago(begun), updatedAt: ago(refreshed) }
    await db.updateTable('token').set(times).where('did', '=', did).execute()
    return {}
  },
}
for await (const line of createInterface({ input: process.stdin })) {
  const { cmd, ...args } = JSON.parse(line)
  answer(await commands[cmd](args))
}

await rm(dataDirectory, { recursive: true, force: true })
process.exit(0)
