#define _GNU_SOURCE
#include "cryptoki.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

/* Every function checks that the module has the entry: the list of a module may
 * have holes. */
#define CKR_ARGUMENTS_BAD 0x07UL
#define CKR_FUNCTION_NOT_SUPPORTED 0x54UL
#define NEED(entry) \
	if (!f || !f->entry) return CKR_FUNCTION_NOT_SUPPORTED
#define NEED2(first, second) \
	if (!f || !f->first || !f->second) return (ck_result){CKR_FUNCTION_NOT_SUPPORTED, 0, 1}

void *ck_open(const char *path, ck_functions **list, ck_rv *rv, char *why, ck_ulong why_len) {
	*list = NULL;
	*rv = 0;
	void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!handle) {
		const char *error = dlerror();
		snprintf(why, why_len, "%s", error ? error : "dlopen failed");
		return NULL;
	}
	ck_rv (*get)(ck_functions **) = (ck_rv (*)(ck_functions **))dlsym(handle, "C_GetFunctionList");
	if (!get) {
		snprintf(why, why_len, "it exports no C_GetFunctionList, so it is no PKCS#11 module");
		dlclose(handle);
		return NULL;
	}
	*rv = get(list);
	return handle;
}

ck_rv ck_initialize(ck_functions *f, ck_ulong flags, char *reserved) {
	NEED(C_Initialize);
	if (!flags && !reserved) return f->C_Initialize(NULL);
	ck_initialize_args args = {.flags = flags, .reserved = reserved};
	return f->C_Initialize(&args);
}

ck_rv ck_finalize(ck_functions *f) {
	NEED(C_Finalize);
	return f->C_Finalize(NULL);
}

ck_rv ck_get_info(ck_functions *f, ck_info *info) {
	NEED(C_GetInfo);
	return f->C_GetInfo(info);
}

ck_rv ck_slots(ck_functions *f, ck_ulong *slots, ck_ulong *count) {
	NEED(C_GetSlotList);
	return f->C_GetSlotList(1, slots, count);
}

ck_rv ck_get_slot_info(ck_functions *f, ck_ulong slot, ck_slot_info *info) {
	NEED(C_GetSlotInfo);
	return f->C_GetSlotInfo(slot, info);
}

ck_rv ck_get_token_info(ck_functions *f, ck_ulong slot, ck_token_info *info) {
	NEED(C_GetTokenInfo);
	return f->C_GetTokenInfo(slot, info);
}

ck_rv ck_mechanisms(ck_functions *f, ck_ulong slot, ck_ulong *list, ck_ulong *count) {
	NEED(C_GetMechanismList);
	return f->C_GetMechanismList(slot, list, count);
}

ck_rv ck_get_mechanism_info(ck_functions *f, ck_ulong slot, ck_ulong type, ck_mechanism_info *info) {
	NEED(C_GetMechanismInfo);
	return f->C_GetMechanismInfo(slot, type, info);
}

ck_rv ck_open_session(ck_functions *f, ck_ulong slot, ck_ulong flags, ck_ulong *session) {
	NEED(C_OpenSession);
	return f->C_OpenSession(slot, flags, NULL, NULL, session);
}

ck_rv ck_close_session(ck_functions *f, ck_ulong session) {
	NEED(C_CloseSession);
	return f->C_CloseSession(session);
}

ck_rv ck_close_all(ck_functions *f, ck_ulong slot) {
	NEED(C_CloseAllSessions);
	return f->C_CloseAllSessions(slot);
}

ck_rv ck_get_session_info(ck_functions *f, ck_ulong session, ck_session_info *info) {
	NEED(C_GetSessionInfo);
	return f->C_GetSessionInfo(session, info);
}

ck_rv ck_login(ck_functions *f, ck_ulong session, ck_byte *pin, ck_ulong len) {
	NEED(C_Login);
	return f->C_Login(session, 1 /* CKU_USER */, pin, len);
}

/* template fills at most CK_MAX_ATTRIBUTES attributes; the values stay where they
 * are. */
static ck_rv template(ck_attribute *a, ck_ulong n, ck_ulong *types, ck_ulong *lens, ck_byte *values) {
	if (n > CK_MAX_ATTRIBUTES) return CKR_ARGUMENTS_BAD;
	for (ck_ulong i = 0; i < n; i++) {
		a[i] = (ck_attribute){types[i], lens[i] ? values : NULL, lens[i]};
		values += lens[i];
	}
	return 0;
}

#define TEMPLATE(name, n, types, lens, values) \
	ck_attribute name[CK_MAX_ATTRIBUTES]; \
	ck_rv name##_rv = template(name, n, types, lens, values); \
	if (name##_rv) return name##_rv

ck_rv ck_create_object(ck_functions *f, ck_ulong session, ck_ulong n, ck_ulong *types, ck_ulong *lens, ck_byte *values, ck_ulong *object) {
	NEED(C_CreateObject);
	TEMPLATE(a, n, types, lens, values);
	return f->C_CreateObject(session, a, n, object);
}

ck_rv ck_destroy_object(ck_functions *f, ck_ulong session, ck_ulong object) {
	NEED(C_DestroyObject);
	return f->C_DestroyObject(session, object);
}

ck_rv ck_get_attribute(ck_functions *f, ck_ulong session, ck_ulong object, ck_ulong type, ck_byte *value, ck_ulong *len) {
	NEED(C_GetAttributeValue);
	ck_attribute a = {type, value, *len};
	ck_rv rv = f->C_GetAttributeValue(session, object, &a, 1);
	*len = a.len;
	return rv;
}

ck_rv ck_set_attributes(ck_functions *f, ck_ulong session, ck_ulong object, ck_ulong n, ck_ulong *types, ck_ulong *lens, ck_byte *values) {
	NEED(C_SetAttributeValue);
	TEMPLATE(a, n, types, lens, values);
	return f->C_SetAttributeValue(session, object, a, n);
}

/* ck_find writes at most *count handles. A module may give them in pieces. Where it
 * says that it gave more than had room, *count is greater than it was: what it found
 * is not known then. */
ck_rv ck_find(ck_functions *f, ck_ulong session, ck_ulong n, ck_ulong *types, ck_ulong *lens, ck_byte *values, ck_ulong *objects, ck_ulong *count) {
	NEED(C_FindObjectsInit);
	NEED(C_FindObjects);
	NEED(C_FindObjectsFinal);
	TEMPLATE(a, n, types, lens, values);
	ck_rv rv = f->C_FindObjectsInit(session, n ? a : NULL, n);
	if (rv) return rv;
	ck_ulong room = *count, got = 0;
	for (*count = 0; *count < room; *count += got) {
		got = 0;
		rv = f->C_FindObjects(session, objects + *count, room - *count, &got);
		if (rv || !got) break;
		if (got > room - *count) {
			*count = ~0UL;
			break;
		}
	}
	ck_rv end = f->C_FindObjectsFinal(session);
	return rv ? rv : end;
}

ck_rv ck_generate_key(ck_functions *f, ck_ulong session, ck_ulong mechanism, ck_ulong n, ck_ulong *types, ck_ulong *lens, ck_byte *values, ck_ulong *key) {
	NEED(C_GenerateKey);
	TEMPLATE(a, n, types, lens, values);
	ck_mechanism m = {mechanism, NULL, 0};
	return f->C_GenerateKey(session, &m, a, n, key);
}

ck_rv ck_generate_pair(ck_functions *f, ck_ulong session, ck_ulong mechanism,
	ck_ulong n, ck_ulong *types, ck_ulong *lens, ck_byte *values,
	ck_ulong private_n, ck_ulong *private_types, ck_ulong *private_lens, ck_byte *private_values,
	ck_ulong *public_key, ck_ulong *private_key) {
	NEED(C_GenerateKeyPair);
	TEMPLATE(a, n, types, lens, values);
	TEMPLATE(b, private_n, private_types, private_lens, private_values);
	ck_mechanism m = {mechanism, NULL, 0};
	return f->C_GenerateKeyPair(session, &m, a, n, b, private_n, public_key, private_key);
}

ck_rv ck_random(ck_functions *f, ck_ulong session, ck_byte *out, ck_ulong len) {
	NEED(C_GenerateRandom);
	return f->C_GenerateRandom(session, out, len);
}

/* parameters fills m and what it points to. Some modules read the parameters in
 * the second call only, so they live as long as the caller's frame. */
typedef union { ck_gcm_params gcm; ck_oaep_params oaep; } parameters;

static void fill(ck_mechanism *m, parameters *p, ck_ulong mechanism, ck_ulong kind, ck_byte *iv, ck_ulong iv_len, ck_ulong iv_bits,
	ck_byte *aad, ck_ulong aad_len, ck_ulong hash, ck_ulong mgf) {
	*m = (ck_mechanism){mechanism, NULL, 0};
	switch (kind) {
	case CK_PARAMS_IV:
		m->parameter = iv, m->len = iv_len;
		break;
	case CK_PARAMS_GCM:
		p->gcm = (ck_gcm_params){iv, iv_len, iv_bits, aad, aad_len, 128};
		m->parameter = &p->gcm, m->len = sizeof p->gcm;
		break;
	case CK_PARAMS_OAEP:
		p->oaep = (ck_oaep_params){hash, mgf, 1 /* CKZ_DATA_SPECIFIED */, NULL, 0};
		m->parameter = &p->oaep, m->len = sizeof p->oaep;
		break;
	}
}

ck_result ck_encrypt(ck_ulong functions, ck_ulong session, ck_ulong key, ck_ulong mechanism, ck_ulong kind,
	ck_byte *iv, ck_ulong iv_len, ck_ulong iv_bits, ck_byte *aad, ck_ulong aad_len, ck_ulong hash, ck_ulong mgf,
	ck_byte *in, ck_ulong in_len, ck_byte *out, ck_ulong out_len) {
	ck_functions *f = (ck_functions *)functions;
	NEED2(C_EncryptInit, C_Encrypt);
	ck_mechanism m;
	parameters p;
	fill(&m, &p, mechanism, kind, iv, iv_len, iv_bits, aad, aad_len, hash, mgf);
	ck_rv rv = f->C_EncryptInit(session, &m, key);
	if (rv) return (ck_result){rv, 0, 1};
	rv = f->C_Encrypt(session, in, in_len, out, &out_len);
	return (ck_result){rv, out_len, 0};
}

ck_result ck_decrypt(ck_ulong functions, ck_ulong session, ck_ulong key, ck_ulong mechanism, ck_ulong kind,
	ck_byte *iv, ck_ulong iv_len, ck_ulong iv_bits, ck_byte *aad, ck_ulong aad_len, ck_ulong hash, ck_ulong mgf,
	ck_byte *in, ck_ulong in_len, ck_byte *out, ck_ulong out_len) {
	ck_functions *f = (ck_functions *)functions;
	NEED2(C_DecryptInit, C_Decrypt);
	ck_mechanism m;
	parameters p;
	fill(&m, &p, mechanism, kind, iv, iv_len, iv_bits, aad, aad_len, hash, mgf);
	ck_rv rv = f->C_DecryptInit(session, &m, key);
	if (rv) return (ck_result){rv, 0, 1};
	rv = f->C_Decrypt(session, in, in_len, out, &out_len);
	return (ck_result){rv, out_len, 0};
}

ck_result ck_sign(ck_functions *f, ck_ulong session, ck_ulong key, ck_ulong mechanism,
	ck_byte *in, ck_ulong in_len, ck_byte *out, ck_ulong out_len) {
	NEED2(C_SignInit, C_Sign);
	ck_mechanism m = {mechanism, NULL, 0};
	ck_rv rv = f->C_SignInit(session, &m, key);
	if (rv) return (ck_result){rv, 0, 1};
	rv = f->C_Sign(session, in, in_len, out, &out_len);
	return (ck_result){rv, out_len, 0};
}

ck_result ck_verify(ck_functions *f, ck_ulong session, ck_ulong key, ck_ulong mechanism,
	ck_byte *in, ck_ulong in_len, ck_byte *mac, ck_ulong mac_len) {
	NEED2(C_VerifyInit, C_Verify);
	ck_mechanism m = {mechanism, NULL, 0};
	ck_rv rv = f->C_VerifyInit(session, &m, key);
	if (rv) return (ck_result){rv, 0, 1};
	return (ck_result){f->C_Verify(session, in, in_len, mac, mac_len), 0, 0};
}
