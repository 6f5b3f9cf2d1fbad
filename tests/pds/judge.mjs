// What the reference makes of client metadata: reads {"ids": [...], "documents": [...]} and writes the same with its
// answers. An id is the configuration of a loopback client, its answer the client_id. The answer to a document is why
// an authorization server refuses it, or null.
import { text } from 'node:stream/consumers'
import { pathToFileURL } from 'node:url'

const modules = `${process.argv[2]}/node_modules/@atproto`
const load = (path) => import(pathToFileURL(`${modules}/${path}`).href)

const { buildAtprotoLoopbackClientId, isOAuthClientIdDiscoverable, oauthClientMetadataSchema } = await load(
  'oauth-types/dist/index.js',
)
const { ClientManager } = await load('oauth-provider/dist/client/client-manager.js')

const manager = Object.create(ClientManager.prototype)
manager.serverMetadata = { grant_types_supported: ['authorization_code', 'refresh_token'] }

function judge(document) {
  if (!isOAuthClientIdDiscoverable(document.client_id)) return 'Invalid client ID'
  try {
    manager.validateClientMetadata(document.client_id, oauthClientMetadataSchema.parse(document))
    return null
  } catch (error) {
    return String(error.message)
  }
}

const { ids, documents } = JSON.parse(await text(process.stdin))
console.log(JSON.stringify({ ids: ids.map(buildAtprotoLoopbackClientId), documents: documents.map(judge) }))
