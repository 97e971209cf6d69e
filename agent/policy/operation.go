package policy

// Operation is what a caller asks the agent to do.
type Operation string

// The operations. ReEncrypt of the wire needs Decrypt on its source and Encrypt
// on its destination; listing keys needs Describe on each key shown.
const (
	Encrypt                         Operation = "encrypt"
	Decrypt                         Operation = "decrypt"
	GenerateDataKey                 Operation = "generate-data-key"
	GenerateDataKeyWithoutPlaintext Operation = "generate-data-key-without-plaintext"
	DecryptDataKey                  Operation = "decrypt-data-key"
	Wrap                            Operation = "wrap"
	Unwrap                          Operation = "unwrap"
	Describe                        Operation = "describe"
	GenerateRandom                  Operation = "generate-random"
)

// Operations returns every operation there is, in the order of the documentation.
func Operations() []Operation {
	return []Operation{
		Encrypt, Decrypt, GenerateDataKey, GenerateDataKeyWithoutPlaintext,
		DecryptDataKey, Wrap, Unwrap, Describe, GenerateRandom,
	}
}

// Keyless reports whether o acts on no key.
func (o Operation) Keyless() bool {
	return o == GenerateRandom
}
