/* A PKCS#11 module that stands before another one and misbehaves as it is told.
 *
 * KMS_AGENT_FAULT_MODULE names the module behind it, KMS_AGENT_FAULT_RULES the file
 * of rules, which is read again when it changes, KMS_AGENT_FAULT_CALLS a file that
 * gets a line for every call. A line of the rules is
 *
 *   FUNCTION [skip=N] [count=N] [sleep_ms=N] [rv=N | segv | abort | exit=N | hang]
 *   iv written | appended-12 | appended-16 | prepended-12 | fixed | short-tag
 *   dead            every call is CKR_DEVICE_ERROR until the rules change and
 *                   C_Finalize was called
 *   no-slots        C_GetSlotList is well and empty
 *   lossy           C_Decrypt changes a bit of what it gives
 *
 * FUNCTION may be *. Structures are those of ../../internal/cryptoki/cryptoki.h. */
#define _GNU_SOURCE
#include "cryptoki.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#define CKR_GENERAL_ERROR 0x05UL
#define CKR_DEVICE_ERROR 0x30UL
#define CKR_BUFFER_TOO_SMALL 0x150UL
#define CKR_CRYPTOKI_NOT_INITIALIZED 0x190UL
#define CKM_AES_GCM 0x1087UL
#define MAX_RULES 64
#define MAX_SESSIONS 256

struct rule {
	char function[40];
	long skip, count, sleep_ms, exit_code;
	ck_rv rv;
	int segv, abort, exit, hang, has_rv;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct rule rules[MAX_RULES];
static int rule_count, dead, dead_now, no_slots, lossy;
static char iv_style[16];
static struct timespec seen;
static off_t seen_size = -1;
static ino_t seen_inode;
static ck_functions *real;
static ck_functions mine;

static struct {
	ck_ulong session;
	ck_byte iv[16];
	int len, used;
} sessions[MAX_SESSIONS];

static void read_rules(void) {
	const char *path = getenv("KMS_AGENT_FAULT_RULES");
	struct stat s;
	if (!path || stat(path, &s)) return;
	if (s.st_mtim.tv_sec == seen.tv_sec && s.st_mtim.tv_nsec == seen.tv_nsec && s.st_size == seen_size && s.st_ino == seen_inode) return;
	seen = s.st_mtim, seen_size = s.st_size, seen_inode = s.st_ino;
	rule_count = dead = no_slots = lossy = 0;
	iv_style[0] = 0;
	FILE *f = fopen(path, "r");
	if (!f) return;
	char line[256];
	while (rule_count < MAX_RULES && fgets(line, sizeof line, f)) {
		char *save = NULL, *word = strtok_r(line, " \t\n", &save);
		if (!word) continue;
		if (!strcmp(word, "dead")) { dead = dead_now = 1; continue; }
		if (!strcmp(word, "no-slots")) { no_slots = 1; continue; }
		if (!strcmp(word, "lossy")) { lossy = 1; continue; }
		if (!strcmp(word, "iv")) {
			word = strtok_r(NULL, " \t\n", &save);
			snprintf(iv_style, sizeof iv_style, "%s", word ? word : "");
			continue;
		}
		struct rule *r = &rules[rule_count++];
		memset(r, 0, sizeof *r);
		r->count = -1;
		snprintf(r->function, sizeof r->function, "%s", word);
		while ((word = strtok_r(NULL, " \t\n", &save))) {
			if (sscanf(word, "skip=%ld", &r->skip) == 1 || sscanf(word, "count=%ld", &r->count) == 1 ||
			    sscanf(word, "sleep_ms=%ld", &r->sleep_ms) == 1) continue;
			if (!strncmp(word, "rv=", 3)) r->rv = strtoul(word + 3, NULL, 0), r->has_rv = 1;
			if (!strncmp(word, "exit=", 5)) r->exit = 1, r->exit_code = atol(word + 5);
			if (!strcmp(word, "segv")) r->segv = 1;
			if (!strcmp(word, "abort")) r->abort = 1;
			if (!strcmp(word, "hang")) r->hang = 1;
		}
	}
	fclose(f);
}

static void note(const char *function) {
	const char *path = getenv("KMS_AGENT_FAULT_CALLS");
	if (!path) return;
	int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0) return;
	char line[64];
	int n = snprintf(line, sizeof line, "%s\n", function);
	if (write(fd, line, (size_t)n) < 0) { /* the test will miss it */ }
	close(fd);
}

/* misbehave returns 1 and sets rv where the call is not to be made. */
static int misbehave(const char *function, ck_rv *rv) {
	struct rule found;
	int hit = 0;
	note(function);
	pthread_mutex_lock(&lock);
	read_rules();
	if (dead_now) {
		if (!dead && !strcmp(function, "C_Finalize")) {
			dead_now = 0; /* and the call is made */
		} else {
			pthread_mutex_unlock(&lock);
			*rv = strcmp(function, "C_Finalize") ? CKR_DEVICE_ERROR : 0;
			return 1;
		}
	}
	for (int i = 0; i < rule_count && !hit; i++) {
		struct rule *r = &rules[i];
		if (strcmp(r->function, "*") && strcmp(r->function, function)) continue;
		if (r->skip > 0) { r->skip--; continue; }
		if (r->count == 0) continue;
		if (r->count > 0) r->count--;
		found = *r, hit = 1;
	}
	pthread_mutex_unlock(&lock);
	if (!hit) return 0;
	if (found.sleep_ms) usleep((useconds_t)found.sleep_ms * 1000);
	if (found.segv) raise(SIGSEGV);
	if (found.abort) abort();
	if (found.exit) _exit((int)found.exit_code);
	while (found.hang) pause();
	*rv = found.rv;
	return found.has_rv;
}

#define GUARD(name) \
	ck_rv refused; \
	if (misbehave(#name, &refused)) return refused; \
	if (!real) return CKR_CRYPTOKI_NOT_INITIALIZED

static ck_rv fault_Initialize(void *args) {
	ck_rv rv;
	if (misbehave("C_Initialize", &rv)) return rv;
	const char *path = getenv("KMS_AGENT_FAULT_MODULE");
	void *handle = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
	ck_rv (*get)(ck_functions **) = handle ? (ck_rv (*)(ck_functions **))dlsym(handle, "C_GetFunctionList") : NULL;
	if (!get || get(&real)) return CKR_GENERAL_ERROR;
	return real->C_Initialize(args);
}

static ck_rv fault_Finalize(void *reserved) { GUARD(C_Finalize); return real->C_Finalize(reserved); }
static ck_rv fault_GetInfo(ck_info *i) { GUARD(C_GetInfo); return real->C_GetInfo(i); }
static ck_rv fault_GetSlotList(ck_byte present, ck_ulong *slots, ck_ulong *count) {
	GUARD(C_GetSlotList);
	if (no_slots) { *count = 0; return 0; }
	return real->C_GetSlotList(present, slots, count);
}
static ck_rv fault_GetSlotInfo(ck_ulong s, ck_slot_info *i) { GUARD(C_GetSlotInfo); return real->C_GetSlotInfo(s, i); }
static ck_rv fault_GetTokenInfo(ck_ulong s, ck_token_info *i) { GUARD(C_GetTokenInfo); return real->C_GetTokenInfo(s, i); }
static ck_rv fault_GetMechanismList(ck_ulong s, ck_ulong *l, ck_ulong *n) { GUARD(C_GetMechanismList); return real->C_GetMechanismList(s, l, n); }
static ck_rv fault_GetMechanismInfo(ck_ulong s, ck_ulong t, ck_mechanism_info *i) { GUARD(C_GetMechanismInfo); return real->C_GetMechanismInfo(s, t, i); }
static ck_rv fault_OpenSession(ck_ulong s, ck_ulong f, void *a, void *n, ck_ulong *h) { GUARD(C_OpenSession); return real->C_OpenSession(s, f, a, n, h); }
static ck_rv fault_CloseSession(ck_ulong h) { GUARD(C_CloseSession); return real->C_CloseSession(h); }
static ck_rv fault_CloseAllSessions(ck_ulong s) { GUARD(C_CloseAllSessions); return real->C_CloseAllSessions(s); }
static ck_rv fault_GetSessionInfo(ck_ulong h, ck_session_info *i) { GUARD(C_GetSessionInfo); return real->C_GetSessionInfo(h, i); }
static ck_rv fault_Login(ck_ulong h, ck_ulong u, ck_byte *p, ck_ulong n) { GUARD(C_Login); return real->C_Login(h, u, p, n); }
static ck_rv fault_CreateObject(ck_ulong h, ck_attribute *a, ck_ulong n, ck_ulong *o) { GUARD(C_CreateObject); return real->C_CreateObject(h, a, n, o); }
static ck_rv fault_DestroyObject(ck_ulong h, ck_ulong o) { GUARD(C_DestroyObject); return real->C_DestroyObject(h, o); }
static ck_rv fault_GetAttributeValue(ck_ulong h, ck_ulong o, ck_attribute *a, ck_ulong n) { GUARD(C_GetAttributeValue); return real->C_GetAttributeValue(h, o, a, n); }
static ck_rv fault_SetAttributeValue(ck_ulong h, ck_ulong o, ck_attribute *a, ck_ulong n) { GUARD(C_SetAttributeValue); return real->C_SetAttributeValue(h, o, a, n); }
static ck_rv fault_FindObjectsInit(ck_ulong h, ck_attribute *a, ck_ulong n) { GUARD(C_FindObjectsInit); return real->C_FindObjectsInit(h, a, n); }
static ck_rv fault_FindObjects(ck_ulong h, ck_ulong *o, ck_ulong m, ck_ulong *n) { GUARD(C_FindObjects); return real->C_FindObjects(h, o, m, n); }
static ck_rv fault_FindObjectsFinal(ck_ulong h) { GUARD(C_FindObjectsFinal); return real->C_FindObjectsFinal(h); }
static ck_rv fault_SignInit(ck_ulong h, ck_mechanism *m, ck_ulong k) { GUARD(C_SignInit); return real->C_SignInit(h, m, k); }
static ck_rv fault_Sign(ck_ulong h, ck_byte *i, ck_ulong n, ck_byte *o, ck_ulong *on) { GUARD(C_Sign); return real->C_Sign(h, i, n, o, on); }
static ck_rv fault_GenerateKey(ck_ulong h, ck_mechanism *m, ck_attribute *a, ck_ulong n, ck_ulong *k) { GUARD(C_GenerateKey); return real->C_GenerateKey(h, m, a, n, k); }
static ck_rv fault_GenerateRandom(ck_ulong h, ck_byte *o, ck_ulong n) { GUARD(C_GenerateRandom); return real->C_GenerateRandom(h, o, n); }

static int style(const char *name) { return !strcmp(iv_style, name); }

/* remember keeps the vector that the token chose for the operation of a session. */
static void remember(ck_ulong session, const ck_byte *iv, int len) {
	pthread_mutex_lock(&lock);
	for (int i = 0; i < MAX_SESSIONS; i++) {
		if (sessions[i].used && sessions[i].session != session) continue;
		sessions[i].used = 1, sessions[i].session = session, sessions[i].len = len;
		memcpy(sessions[i].iv, iv, (size_t)len);
		break;
	}
	pthread_mutex_unlock(&lock);
}

/* recall gives the vector of a session's operation, and forgets it unless it is to be
 * kept. */
static int recall(ck_ulong session, ck_byte *iv, int keep) {
	int len = 0;
	pthread_mutex_lock(&lock);
	for (int i = 0; i < MAX_SESSIONS; i++) {
		if (!sessions[i].used || sessions[i].session != session) continue;
		len = sessions[i].len, sessions[i].used = keep;
		memcpy(iv, sessions[i].iv, (size_t)len);
	}
	pthread_mutex_unlock(&lock);
	return len;
}

static ck_rv fault_EncryptInit(ck_ulong h, ck_mechanism *m, ck_ulong k) {
	GUARD(C_EncryptInit);
	if (m->type != CKM_AES_GCM || !iv_style[0]) return real->C_EncryptInit(h, m, k);
	ck_gcm_params *given = m->parameter, own = *given;
	ck_byte iv[16] = "a vector for all";
	own.iv = iv, own.iv_len = style("appended-16") ? 16 : 12, own.iv_bits = own.iv_len * 8;
	if (!style("fixed") && getrandom(iv, sizeof iv, 0) != sizeof iv) return CKR_GENERAL_ERROR;
	if (style("short-tag")) own = *given, own.tag_bits = 96;
	if (style("written")) memcpy(given->iv, iv, 12);
	if (style("appended-12") || style("appended-16") || style("prepended-12")) remember(h, iv, (int)own.iv_len);
	ck_mechanism mechanism = {m->type, &own, sizeof own};
	return real->C_EncryptInit(h, &mechanism, k);
}

static ck_rv fault_Encrypt(ck_ulong h, ck_byte *in, ck_ulong n, ck_byte *out, ck_ulong *len) {
	GUARD(C_Encrypt);
	ck_byte iv[16];
	ck_ulong extra = (ck_ulong)recall(h, iv, 1), needed = n + 16 + extra;
	if (extra && (!out || *len < needed)) {
		*len = needed;
		return out ? CKR_BUFFER_TOO_SMALL : 0;
	}
	recall(h, iv, 0);
	ck_rv rv = real->C_Encrypt(h, in, n, out, len);
	if (rv || !extra) return rv;
	if (style("prepended-12")) {
		memmove(out + extra, out, *len);
		memcpy(out, iv, extra);
	} else {
		memcpy(out + *len, iv, extra);
	}
	*len += extra;
	return 0;
}

static ck_rv fault_DecryptInit(ck_ulong h, ck_mechanism *m, ck_ulong k) {
	GUARD(C_DecryptInit);
	if (m->type != CKM_AES_GCM || !style("short-tag")) return real->C_DecryptInit(h, m, k);
	ck_gcm_params own = *(ck_gcm_params *)m->parameter;
	own.tag_bits = 96;
	ck_mechanism mechanism = {m->type, &own, sizeof own};
	return real->C_DecryptInit(h, &mechanism, k);
}

static ck_rv fault_Decrypt(ck_ulong h, ck_byte *in, ck_ulong n, ck_byte *out, ck_ulong *len) {
	GUARD(C_Decrypt);
	ck_rv rv = real->C_Decrypt(h, in, n, out, len);
	if (!rv && lossy && out && *len) out[0] ^= 1;
	return rv;
}

static ck_rv fault_GenerateKeyPair(ck_ulong h, ck_mechanism *m, ck_attribute *a, ck_ulong n, ck_attribute *b, ck_ulong bn, ck_ulong *pub, ck_ulong *priv) {
	GUARD(C_GenerateKeyPair);
	return real->C_GenerateKeyPair(h, m, a, n, b, bn, pub, priv);
}

static ck_rv fault_GetFunctionList(ck_functions **list);

#define SET(name) .C_##name = fault_##name
static ck_functions mine = {
	.version = {2, 40}, SET(Initialize), SET(Finalize), SET(GetInfo), SET(GetFunctionList), SET(GetSlotList), SET(GetSlotInfo),
	SET(GetTokenInfo), SET(GetMechanismList), SET(GetMechanismInfo), SET(OpenSession), SET(CloseSession), SET(CloseAllSessions),
	SET(GetSessionInfo), SET(Login), SET(CreateObject), SET(DestroyObject), SET(GetAttributeValue), SET(SetAttributeValue),
	SET(FindObjectsInit), SET(FindObjects), SET(FindObjectsFinal), SET(EncryptInit), SET(Encrypt), SET(DecryptInit), SET(Decrypt),
	SET(SignInit), SET(Sign), SET(GenerateKey), SET(GenerateKeyPair), SET(GenerateRandom),
};

static ck_rv fault_GetFunctionList(ck_functions **list) {
	*list = &mine;
	return 0;
}

__attribute__((visibility("default"))) ck_rv C_GetFunctionList(ck_functions **list) { return fault_GetFunctionList(list); }
