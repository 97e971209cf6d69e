// Makes vectors.json from docs/format.md alone, with nothing but Node's own
// cryptography and without the Go code that it tests:
//
//	node vectors.mjs > vectors.json
//
// Everything is made by counting, so the output never changes. The file is
// frozen: a difference is a change of the format.
import { createCipheriv, createHash, hkdfSync } from 'node:crypto'

const count = (first, n) => Buffer.from(Array.from({ length: n }, (_, i) => (first + i) & 0xff))
const uint = (size) => (value) => {
  const b = Buffer.alloc(8)
  b.writeBigUInt64BE(BigInt(value))
  return b.subarray(8 - size)
}
const [u8, u16, u32, u64] = [1, 2, 4, 8].map(uint)
const cat = (...parts) => Buffer.concat(parts.map((p) => Buffer.from(p)))
const field = (bytes) => cat(u16(Buffer.byteLength(bytes)), bytes)

const gcm = (key, iv, plaintext, aad) => {
  const c = createCipheriv('aes-256-gcm', key, iv)
  c.setAAD(aad)
  return [Buffer.concat([c.update(plaintext), c.final()]), c.getAuthTag()]
}

const dataKey = count(0x00, 32)
const messageID = count(0x80, 32)
const wrapping = { key: count(0x20, 32), namespace: 'interop', name: 'counting', iv: count(0x60, 12) }

// plaintext of n bytes: 32-bit numbers from 0.
const plaintextOf = (n) => {
  const b = Buffer.alloc(Math.ceil(n / 4) * 4)
  for (let i = 0; i < b.length / 4; i++) b.writeUInt32BE(i, 4 * i)
  return b.subarray(0, n)
}

// pairs of the encryption context, sorted by the bytes of their keys.
const pairsOf = (context) => {
  const pairs = Object.entries(context).map((pair) => pair.map((s) => Buffer.from(s)))
  if (pairs.length === 0) return Buffer.alloc(0)
  pairs.sort((a, b) => Buffer.compare(a[0], b[0]))
  return cat(u16(pairs.length), ...pairs.flat().map(field))
}

// provider information of an EDK with provider ID "kms-agent".
const providerInfo = (purpose, bound, key, uri, version) =>
  cat(u8(1), u8(purpose), u8(bound), count(0x40, 16), field(key), field(uri), field(version))

const edksOf = (context) => {
  const info = cat(wrapping.name, u32(128), u32(12), wrapping.iv) // AWS's raw AES keyring
  const wrapped = cat(...gcm(wrapping.key, wrapping.iv, dataKey, pairsOf(context)))
  return [
    ['kms-agent', providerInfo(1, 0, 'orders', 'vault:transit/orders', '3'), count(0xc0, 60)],
    [wrapping.namespace, info, wrapped],
  ]
}

const derive = (info, size) => Buffer.from(hkdfSync('sha512', dataKey, messageID, info, size))
const key = derive(cat(u16(0x0478), 'DERIVEKEY'), 32)

const header = (context, contentType, frameLength) => {
  const body = cat(
    u8(2), u16(0x0478), messageID, field(pairsOf(context)),
    u16(2), ...edksOf(context).flat().map(field),
    u8(contentType), u32(frameLength), derive('COMMITKEY', 32))
  return cat(body, gcm(key, Buffer.alloc(12), '', body)[1])
}

const bodyAAD = (name, sequence, length) => cat(messageID, `AWSKMSEncryptionClient ${name}`, u32(sequence), u64(length))
const countingIV = (sequence) => cat(Buffer.alloc(8), u32(sequence))
const otherIV = (sequence) => count(0xa5 + 16 * sequence, 12)

const finalFrame = (sequence, text, iv) =>
  cat(u32(0xffffffff), u32(sequence), iv, u32(text.length), ...gcm(key, iv, text, bodyAAD('Final Frame', sequence, text.length)))
const regularFrame = (sequence, text, iv) =>
  cat(u32(sequence), iv, ...gcm(key, iv, text, bodyAAD('Frame', sequence, text.length)))

// framed splits the plaintext; emptyLast puts all of it into regular frames.
const framed = (plaintext, frameLength, { emptyLast = false, iv = countingIV } = {}) => {
  const frames = []
  let sequence = 1
  while (plaintext.length > frameLength || (emptyLast && plaintext.length > 0)) {
    frames.push(regularFrame(sequence, plaintext.subarray(0, frameLength), iv(sequence)))
    plaintext = plaintext.subarray(frameLength)
    sequence++
  }
  return cat(...frames, finalFrame(sequence, plaintext, iv(sequence)))
}
const nonFramed = (plaintext, iv) =>
  cat(iv, u64(plaintext.length), ...gcm(key, iv, plaintext, bodyAAD('Single Block', 1, plaintext.length)))

const context = { tenant: 'acme', table: 'orders', 'größe': 'µ' }
const vectors = []
const add = (name, writer, plaintextLength, context, contentType, frameLength, body) => {
  const message = cat(header(context, contentType, frameLength), body(plaintextOf(plaintextLength)))
  const v = { name, writer, plaintextLength, context, frameLength, messageSHA256: createHash('sha256').update(message).digest('hex') }
  if (message.length < 8192) v.message = message.toString('hex')
  vectors.push(v)
}
const addFramed = (name, writer, n, context, frameLength, options) =>
  add(name, writer, n, context, 2, frameLength, (p) => framed(p, frameLength, options))

// What Seal and Writer write, byte for byte.
addFramed('one-shot', 'seal', 45, context, 4096)
addFramed('one-shot of no bytes, without context', 'seal', 0, {}, 4096)
addFramed('one-shot longer than the least frame', 'seal', 4097, context, 4097)
addFramed('stream of no bytes', 'stream', 0, context, 65536)
addFramed('stream of one frame', 'stream', 65536, context, 65536)
addFramed('stream of two frames', 'stream', 65537, context, 65536)
// What other writers may write and we only read.
addFramed('several frames', 'other', 40, context, 16)
addFramed('last frame full', 'other', 32, context, 16)
addFramed('last frame empty', 'other', 32, context, 16, { emptyLast: true })
addFramed('IVs that do not count', 'other', 40, context, 16, { iv: otherIV })
add('not framed', 'other', 45, context, 1, 0, (p) => nonFramed(p, countingIV(1)))
add('not framed, another IV', 'other', 45, {}, 1, 0, (p) => nonFramed(p, otherIV(1)))
add('not framed, no bytes', 'other', 0, context, 1, 0, (p) => nonFramed(p, countingIV(1)))

const hex = (b) => b.toString('hex')
console.log(JSON.stringify({
  dataKey: hex(dataKey),
  messageID: hex(messageID),
  edks: edksOf(context).map(([providerID, info, ciphertext]) => ({ providerID: providerID, providerInfo: hex(Buffer.from(info)), ciphertext: hex(ciphertext) })),
  edksWithoutContext: edksOf({}).map(([providerID, info, ciphertext]) => ({ providerID: providerID, providerInfo: hex(Buffer.from(info)), ciphertext: hex(ciphertext) })),
  wrapping: { key: hex(wrapping.key), namespace: wrapping.namespace, name: wrapping.name },
  vectors,
}, null, 1))
