// The other side of the interop tests: one JSON request a line in, one JSON
// reply a line out. It uses the AWS Encryption SDK for JavaScript as its
// documentation says and knows nothing of the format.
import { createInterface } from 'node:readline'
import { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import {
  AlgorithmSuiteIdentifier, buildClient, CommitmentPolicy, MultiKeyringNode, RawAesKeyringNode, RawAesWrappingSuiteIdentifier,
} from '@aws-crypto/client-node'

const { encrypt, decrypt, encryptStream, decryptUnsignedMessageStream } = buildClient(CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT)
const suiteId = AlgorithmSuiteIdentifier.ALG_AES256_GCM_IV12_TAG16_HKDF_SHA512_COMMIT_KEY

const aesKeyring = ({ namespace, name, key }) => new RawAesKeyringNode({
  keyNamespace: namespace,
  keyName: name,
  unencryptedMasterKey: new Uint8Array(Buffer.from(key, 'base64')), // a copy: it must not share Node's pool
  wrappingSuite: RawAesWrappingSuiteIdentifier.AES256_GCM_IV12_TAG16_NO_PADDING,
  utf8Sorting: true,
})
const keyringOf = ([first, ...others]) =>
  others.length === 0 ? aesKeyring(first) : new MultiKeyringNode({ generator: aesKeyring(first), children: others.map(aesKeyring) })

// pieces cuts data, so that streams see other borders than frames.
function* pieces(data, size) {
  for (let at = 0; at < data.length; at += size) yield data.subarray(at, at + size)
}
const through = async (data, stream) => buffer(Readable.from(pieces(data, 10007), { objectMode: false }).on('error', (e) => stream.destroy(e)).pipe(stream))

const operations = {
  async encrypt({ keys, context, frameLength, data }) {
    const options = { suiteId, encryptionContext: context ?? {}, frameLength }
    return { data: (await encrypt(keyringOf(keys), Buffer.from(data, 'base64'), options)).result }
  },
  async encryptStream({ keys, context, frameLength, data }) {
    const options = { suiteId, encryptionContext: context ?? {}, frameLength }
    return { data: await through(Buffer.from(data, 'base64'), encryptStream(keyringOf(keys), options)) }
  },
  async decrypt({ keys, data }) {
    const { plaintext, messageHeader } = await decrypt(keyringOf(keys), Buffer.from(data, 'base64'))
    return { data: plaintext, context: messageHeader.encryptionContext, suite: messageHeader.suiteId, frameLength: messageHeader.frameLength }
  },
  async decryptStream({ keys, data }) {
    return { data: await through(Buffer.from(data, 'base64'), decryptUnsignedMessageStream(keyringOf(keys))) }
  },
}

for await (const line of createInterface({ input: process.stdin })) {
  let reply
  try {
    const request = JSON.parse(line)
    reply = await operations[request.operation](request)
    reply.data = Buffer.from(reply.data).toString('base64')
  } catch (e) {
    reply = { error: String(e?.message ?? e) }
  }
  process.stdout.write(JSON.stringify(reply) + '\n')
}
