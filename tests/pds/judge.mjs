// What the reference makes of client metadata and of scopes: reads {"ids": [...], "documents": [...], "questions": [...],
// "sets": [...]} and writes the same with its answers. An id is the configuration of a loopback client, its answer the
// client_id. The answer to a document is why an authorization server refuses it, or null. A question is {granted, scope},
// its answer whether a PDS permits it. A set is {include, permissions}, its answer the scopes that a server makes of it.
import { text } from 'node:stream/consumers'
import { pathToFileURL } from 'node:url'

const modules = `${process.argv[2]}/node_modules/@atproto`
const load = (path) => import(pathToFileURL(`${modules}/${path}`).href)

const { buildAtprotoLoopbackClientId, isOAuthClientIdDiscoverable, oauthClientMetadataSchema } = await load(
  'oauth-types/dist/index.js',
)
const { ClientManager } = await load('oauth-provider/dist/client/client-manager.js')

const scopes = await load('oauth-scopes/dist/index.js')

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

const parse = (name, scope) => {
  try {
    return scopes[name].fromString(scope)
  } catch {
    return undefined // a percent sign out of place, which keeps the reference from reading any of the scopes
  }
}
// Every single thing that a scope asks for. There is no wildcard for media types in a question: something that nobody
// has heard of, and so only a wildcard can grant, stands for it.
const pairs = (left, right) => left.flatMap((each) => right.map((other) => [each, other]))
const SINGLE = {
  RepoPermission: (p) => pairs(p.collection, p.action).map(([collection, action]) => ['allowsRepo', { collection, action }]),
  RpcPermission: (p) => p.lxm.map((lxm) => ['allowsRpc', { lxm, aud: p.aud }]),
  BlobPermission: (p) => p.accept.map((accept) => ['allowsBlob', { mime: accept.replace('*/*', 'new/new').replace('*', 'new') }]),
  AccountPermission: (p) => p.action.map((action) => ['allowsAccount', { attr: p.attr, action }]),
  IdentityPermission: (p) => [['allowsIdentity', { attr: p.attr }]],
}

function permits({ granted, scope }) {
  const isReadable = (each) => Object.keys(SINGLE).every((name) => parse(name, each) !== undefined)
  const permissions = new scopes.ScopePermissionsTransition(granted.split(' ').filter(isReadable))
  for (const [name, single] of Object.entries(SINGLE)) {
    const asked = parse(name, scope)
    if (asked) return single(asked).every(([method, options]) => permissions[method](options))
  }
  return false
}

const expand = ({ include, permissions }) => scopes.IncludeScope.fromString(include).toScopes({ permissions })
const normalize = (list) => list.map(scopes.normalizeAtprotoOauthScopeValue)

const { ids = [], documents = [], questions = [], sets = [], ours = [] } = JSON.parse(await text(process.stdin))
console.log(
  JSON.stringify({
    ids: ids.map(buildAtprotoLoopbackClientId),
    documents: documents.map(judge),
    questions: questions.map(permits),
    sets: sets.map(expand),
    ours: ours.map(normalize),
  }),
)
