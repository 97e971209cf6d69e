/* The part of the PKCS#11 v2.40 ABI (OASIS, "PKCS #11 Cryptographic Token
 * Interface Base Specification") that the agent uses, on Linux: natural
 * alignment, CK_ULONG = unsigned long. */
#ifndef KMSAGENT_CRYPTOKI_H
#define KMSAGENT_CRYPTOKI_H

typedef unsigned char ck_byte;
typedef unsigned long ck_ulong;
typedef unsigned long ck_rv;

typedef struct { ck_byte major, minor; } ck_version;

typedef struct {
	ck_version cryptoki;
	ck_byte manufacturer[32];
	ck_ulong flags;
	ck_byte description[32];
	ck_version library;
} ck_info;

typedef struct {
	ck_byte description[64];
	ck_byte manufacturer[32];
	ck_ulong flags;
	ck_version hardware, firmware;
} ck_slot_info;

typedef struct {
	ck_byte label[32], manufacturer[32], model[16], serial[16];
	ck_ulong flags;
	ck_ulong max_sessions, sessions, max_rw_sessions, rw_sessions;
	ck_ulong max_pin, min_pin;
	ck_ulong total_public, free_public, total_private, free_private;
	ck_version hardware, firmware;
	ck_byte utc[16];
} ck_token_info;

typedef struct { ck_ulong slot, state, flags, device_error; } ck_session_info;
typedef struct { ck_ulong type; void *value; ck_ulong len; } ck_attribute;
typedef struct { ck_ulong type; void *parameter; ck_ulong len; } ck_mechanism;
typedef struct { ck_ulong min, max, flags; } ck_mechanism_info;

typedef struct {
	void *create, *destroy, *lock, *unlock;
	ck_ulong flags;
	void *reserved;
} ck_initialize_args;

typedef struct {
	ck_byte *iv;
	ck_ulong iv_len, iv_bits;
	ck_byte *aad;
	ck_ulong aad_len, tag_bits;
} ck_gcm_params;

typedef struct {
	ck_ulong hash, mgf, source;
	void *data;
	ck_ulong data_len;
} ck_oaep_params;

typedef ck_rv (*ck_unused)(void);

/* The order of the entries is the ABI. */
typedef struct ck_functions {
	ck_version version;
	ck_rv (*C_Initialize)(void *args);
	ck_rv (*C_Finalize)(void *reserved);
	ck_rv (*C_GetInfo)(ck_info *info);
	ck_rv (*C_GetFunctionList)(struct ck_functions **list);
	ck_rv (*C_GetSlotList)(ck_byte present, ck_ulong *slots, ck_ulong *count);
	ck_rv (*C_GetSlotInfo)(ck_ulong slot, ck_slot_info *info);
	ck_rv (*C_GetTokenInfo)(ck_ulong slot, ck_token_info *info);
	ck_rv (*C_GetMechanismList)(ck_ulong slot, ck_ulong *list, ck_ulong *count);
	ck_rv (*C_GetMechanismInfo)(ck_ulong slot, ck_ulong type, ck_mechanism_info *info);
	ck_unused C_InitToken, C_InitPIN, C_SetPIN;
	ck_rv (*C_OpenSession)(ck_ulong slot, ck_ulong flags, void *application, void *notify, ck_ulong *session);
	ck_rv (*C_CloseSession)(ck_ulong session);
	ck_rv (*C_CloseAllSessions)(ck_ulong slot);
	ck_rv (*C_GetSessionInfo)(ck_ulong session, ck_session_info *info);
	ck_unused C_GetOperationState, C_SetOperationState;
	ck_rv (*C_Login)(ck_ulong session, ck_ulong user, ck_byte *pin, ck_ulong len);
	ck_rv (*C_Logout)(ck_ulong session);
	ck_rv (*C_CreateObject)(ck_ulong session, ck_attribute *attributes, ck_ulong count, ck_ulong *object);
	ck_unused C_CopyObject;
	ck_rv (*C_DestroyObject)(ck_ulong session, ck_ulong object);
	ck_unused C_GetObjectSize;
	ck_rv (*C_GetAttributeValue)(ck_ulong session, ck_ulong object, ck_attribute *attributes, ck_ulong count);
	ck_rv (*C_SetAttributeValue)(ck_ulong session, ck_ulong object, ck_attribute *attributes, ck_ulong count);
	ck_rv (*C_FindObjectsInit)(ck_ulong session, ck_attribute *attributes, ck_ulong count);
	ck_rv (*C_FindObjects)(ck_ulong session, ck_ulong *objects, ck_ulong max, ck_ulong *count);
	ck_rv (*C_FindObjectsFinal)(ck_ulong session);
	ck_rv (*C_EncryptInit)(ck_ulong session, ck_mechanism *mechanism, ck_ulong key);
	ck_rv (*C_Encrypt)(ck_ulong session, ck_byte *in, ck_ulong in_len, ck_byte *out, ck_ulong *out_len);
	ck_unused C_EncryptUpdate, C_EncryptFinal;
	ck_rv (*C_DecryptInit)(ck_ulong session, ck_mechanism *mechanism, ck_ulong key);
	ck_rv (*C_Decrypt)(ck_ulong session, ck_byte *in, ck_ulong in_len, ck_byte *out, ck_ulong *out_len);
	ck_unused C_DecryptUpdate, C_DecryptFinal;
	ck_unused C_DigestInit, C_Digest, C_DigestUpdate, C_DigestKey, C_DigestFinal;
	ck_rv (*C_SignInit)(ck_ulong session, ck_mechanism *mechanism, ck_ulong key);
	ck_rv (*C_Sign)(ck_ulong session, ck_byte *in, ck_ulong in_len, ck_byte *out, ck_ulong *out_len);
	ck_unused C_SignUpdate, C_SignFinal, C_SignRecoverInit, C_SignRecover;
	ck_rv (*C_VerifyInit)(ck_ulong session, ck_mechanism *mechanism, ck_ulong key);
	ck_rv (*C_Verify)(ck_ulong session, ck_byte *in, ck_ulong in_len, ck_byte *mac, ck_ulong mac_len);
	ck_unused C_VerifyUpdate, C_VerifyFinal, C_VerifyRecoverInit, C_VerifyRecover;
	ck_unused C_DigestEncryptUpdate, C_DecryptDigestUpdate, C_SignEncryptUpdate, C_DecryptVerifyUpdate;
	ck_rv (*C_GenerateKey)(ck_ulong session, ck_mechanism *mechanism, ck_attribute *attributes, ck_ulong count, ck_ulong *key);
	ck_rv (*C_GenerateKeyPair)(ck_ulong session, ck_mechanism *mechanism, ck_attribute *public_attributes, ck_ulong public_count,
		ck_attribute *private_attributes, ck_ulong private_count, ck_ulong *public_key, ck_ulong *private_key);
	ck_unused C_WrapKey, C_UnwrapKey, C_DeriveKey, C_SeedRandom;
	ck_rv (*C_GenerateRandom)(ck_ulong session, ck_byte *out, ck_ulong len);
	ck_unused C_GetFunctionStatus, C_CancelFunction, C_WaitForSlotEvent;
} ck_functions;

/* What a mechanism is given. */
enum { CK_PARAMS_NONE, CK_PARAMS_IV, CK_PARAMS_GCM, CK_PARAMS_OAEP };

/* How an operation of two calls ended. */
typedef struct {
	ck_rv rv;
	ck_ulong len;  /* of the output */
	ck_ulong init; /* 1 where the first call failed */
} ck_result;

/* Templates come as arrays of types and lengths with the values one after the
 * other. */
#define CK_MAX_ATTRIBUTES 32

void *ck_open(const char *path, ck_functions **list, ck_rv *rv, char *why, ck_ulong why_len);
ck_rv ck_initialize(ck_functions *f, ck_ulong flags, char *reserved);
ck_rv ck_finalize(ck_functions *f);
ck_rv ck_get_info(ck_functions *f, ck_info *info);
ck_rv ck_slots(ck_functions *f, ck_ulong *slots, ck_ulong *count);
ck_rv ck_get_slot_info(ck_functions *f, ck_ulong slot, ck_slot_info *info);
ck_rv ck_get_token_info(ck_functions *f, ck_ulong slot, ck_token_info *info);
ck_rv ck_mechanisms(ck_functions *f, ck_ulong slot, ck_ulong *list, ck_ulong *count);
ck_rv ck_get_mechanism_info(ck_functions *f, ck_ulong slot, ck_ulong type, ck_mechanism_info *info);
ck_rv ck_open_session(ck_functions *f, ck_ulong slot, ck_ulong flags, ck_ulong *session);
ck_rv ck_close_session(ck_functions *f, ck_ulong session);
ck_rv ck_close_all(ck_functions *f, ck_ulong slot);
ck_rv ck_get_session_info(ck_functions *f, ck_ulong session, ck_session_info *info);
ck_rv ck_login(ck_functions *f, ck_ulong session, ck_byte *pin, ck_ulong len);
ck_rv ck_create_object(ck_functions *f, ck_ulong session, ck_ulong n, ck_ulong *types, ck_ulong *lens, ck_byte *values, ck_ulong *object);
ck_rv ck_destroy_object(ck_functions *f, ck_ulong session, ck_ulong object);
ck_rv ck_get_attribute(ck_functions *f, ck_ulong session, ck_ulong object, ck_ulong type, ck_byte *value, ck_ulong *len);
ck_rv ck_set_attributes(ck_functions *f, ck_ulong session, ck_ulong object, ck_ulong n, ck_ulong *types, ck_ulong *lens, ck_byte *values);
ck_rv ck_find(ck_functions *f, ck_ulong session, ck_ulong n, ck_ulong *types, ck_ulong *lens, ck_byte *values, ck_ulong *objects, ck_ulong *count);
ck_rv ck_generate_key(ck_functions *f, ck_ulong session, ck_ulong mechanism, ck_ulong n, ck_ulong *types, ck_ulong *lens, ck_byte *values, ck_ulong *key);
ck_rv ck_generate_pair(ck_functions *f, ck_ulong session, ck_ulong mechanism,
	ck_ulong n, ck_ulong *types, ck_ulong *lens, ck_byte *values,
	ck_ulong private_n, ck_ulong *private_types, ck_ulong *private_lens, ck_byte *private_values,
	ck_ulong *public_key, ck_ulong *private_key);
ck_rv ck_random(ck_functions *f, ck_ulong session, ck_byte *out, ck_ulong len);
ck_result ck_encrypt(ck_ulong functions, ck_ulong session, ck_ulong key, ck_ulong mechanism, ck_ulong kind,
	ck_byte *iv, ck_ulong iv_len, ck_ulong iv_bits, ck_byte *aad, ck_ulong aad_len, ck_ulong hash, ck_ulong mgf,
	ck_byte *in, ck_ulong in_len, ck_byte *out, ck_ulong out_len);
ck_result ck_decrypt(ck_ulong functions, ck_ulong session, ck_ulong key, ck_ulong mechanism, ck_ulong kind,
	ck_byte *iv, ck_ulong iv_len, ck_ulong iv_bits, ck_byte *aad, ck_ulong aad_len, ck_ulong hash, ck_ulong mgf,
	ck_byte *in, ck_ulong in_len, ck_byte *out, ck_ulong out_len);
ck_result ck_sign(ck_functions *f, ck_ulong session, ck_ulong key, ck_ulong mechanism,
	ck_byte *in, ck_ulong in_len, ck_byte *out, ck_ulong out_len);
ck_result ck_verify(ck_functions *f, ck_ulong session, ck_ulong key, ck_ulong mechanism,
	ck_byte *in, ck_ulong in_len, ck_byte *mac, ck_ulong mac_len);

#endif
