// The reference client, driven by the tests: lines of JSON in, lines of JSON out, until stdin closes.
//
//   node node_client.mjs '{"installation": "/dir/with/node_modules", "clientId": "http://localhost?...",
//                          "handleResolver": "http://localhost:1", "plcDirectoryUrl": "http://localhost:2"}'
//
// Its stores are two maps in memory, which the tests may read and fill. A request that fails is answered with
// {"error": {"name", "message"}}.

import { createRequire } from 'node:module'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { pathToFileURL } from 'node:url'

const { installation, clientId, handleResolver, plcDirectoryUrl } = JSON.parse(process.argv[2])
// The packages are installed outside of this source tree, where an import statement would not look.
const require = createRequire(join(installation, 'package.json'))
const { NodeOAuthClient, atprotoLoopbackClientMetadata } = await import(
  pathToFileURL(require.resolve('@atproto/oauth-client-node'))
)

const sessions = new Map()
const states = new Map()
const storeOf = (map) => ({
  get: async (key) => map.get(key),
  set: async (key, value) => void map.set(key, value),
  del: async (key) => void map.delete(key),
})

const client = new NodeOAuthClient({
  clientMetadata: atprotoLoopbackClientMetadata(clientId),
  allowHttp: true,
  handleResolver,
  plcDirectoryUrl,
  stateStore: storeOf(states),
  sessionStore: storeOf(sessions),
  requestLock: async (name, fn) => fn(),
})

const described = async (session) => ({
  did: session.did,
  // Not refreshed again by asking, and with the getter that says whether it has expired.
  tokenInfo: await session.getTokenInfo(false).then((info) => ({ ...info, expired: info.expired })),
  document: sessions.get(session.did),
})

const commands = {
  authorize: async ({ identifier, options }) => ({ url: (await client.authorize(identifier, options)).href }),
  callback: async ({ params, options }) => {
    const { session, state } = await client.callback(new URLSearchParams(params), options)
    return { ...(await described(session)), state }
  },
  restore: async ({ did, refresh }) => described(await client.restore(did, refresh)),
  call: async ({ did, path }) => {
    const response = await (await client.restore(did)).fetchHandler(path)
    return { status: response.status, body: await response.text(), document: sessions.get(did) ?? null }
  },
  revoke: async ({ did }) => void (await client.revoke(did)),
  documents: async () => ({ sessions: Object.fromEntries(sessions), states: Object.fromEntries(states) }),
  put: async ({ did, document }) => void sessions.set(did, document),
}

const answer = (value) => process.stdout.write(JSON.stringify(value ?? {}) + '\n')

answer({})
for await (const line of createInterface({ input: process.stdin })) {
  const { cmd, ...args } = JSON.parse(line)
  try {
    answer(await commands[cmd](args))
  } catch (error) {
    answer({ error: { name: error.constructor.name, message: error.message } })
  }
}
process.exit(0)
