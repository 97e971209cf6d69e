/* What C alone makes of a token: wraps and unwraps 32 bytes with CKM_AES_GCM in a
 * number of sessions for a time, and prints how many pairs there were per second.
 *
 *   loop MODULE PIN KEY_ID_HEX SESSIONS MILLISECONDS */
#define _GNU_SOURCE
#include "cryptoki.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

static ck_functions *f;
static ck_ulong slot;
static ck_byte id[16];
static atomic_int stop;
static atomic_long pairs;

static void check(const char *what, ck_rv rv) {
	if (!rv) return;
	fprintf(stderr, "%s: %#lx\n", what, rv);
	exit(1);
}

static double now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void *work(void *unused) {
	(void)unused;
	ck_ulong h, key, n = 0, class = 4 /* CKO_SECRET_KEY */;
	check("C_OpenSession", f->C_OpenSession(slot, 6, NULL, NULL, &h));
	ck_attribute wanted[] = {{0 /* CKA_CLASS */, &class, sizeof class}, {0x102 /* CKA_ID */, id, sizeof id}};
	check("C_FindObjectsInit", f->C_FindObjectsInit(h, wanted, 2));
	check("C_FindObjects", f->C_FindObjects(h, &key, 1, &n));
	check("C_FindObjectsFinal", f->C_FindObjectsFinal(h));
	if (n != 1) check("no key", 1);
	ck_byte in[32] = {7}, out[128], back[128], iv[12], aad[64] = {1};
	while (!stop) {
		if (getrandom(iv, sizeof iv, 0) != sizeof iv) check("getrandom", 1);
		ck_gcm_params p = {iv, sizeof iv, 96, aad, sizeof aad, 128};
		ck_mechanism m = {0x1087 /* CKM_AES_GCM */, &p, sizeof p};
		ck_ulong len = sizeof out, back_len = sizeof back;
		check("C_EncryptInit", f->C_EncryptInit(h, &m, key));
		check("C_Encrypt", f->C_Encrypt(h, in, sizeof in, out, &len));
		check("C_DecryptInit", f->C_DecryptInit(h, &m, key));
		check("C_Decrypt", f->C_Decrypt(h, out, len, back, &back_len));
		pairs++;
	}
	return NULL;
}

int main(int argc, char **argv) {
	if (argc != 6) return 2;
	void *handle = dlopen(argv[1], RTLD_NOW);
	ck_rv (*get)(ck_functions **) = handle ? (ck_rv (*)(ck_functions **))dlsym(handle, "C_GetFunctionList") : NULL;
	if (!get) check("dlopen", 1);
	check("C_GetFunctionList", get(&f));
	ck_initialize_args args = {.flags = 2};
	check("C_Initialize", f->C_Initialize(&args));
	ck_ulong slots[16], n = 16;
	check("C_GetSlotList", f->C_GetSlotList(1, slots, &n));
	for (ck_ulong i = 0; i < n; i++) {
		ck_token_info t;
		if (!f->C_GetTokenInfo(slots[i], &t) && (t.flags & 0x400)) slot = slots[i];
	}
	for (int i = 0; i < 16; i++) {
		unsigned b;
		if (sscanf(argv[3] + 2 * i, "%2x", &b) != 1) return 2;
		id[i] = (ck_byte)b;
	}
	ck_ulong anchor;
	check("C_OpenSession", f->C_OpenSession(slot, 6, NULL, NULL, &anchor));
	check("C_Login", f->C_Login(anchor, 1, (ck_byte *)argv[2], strlen(argv[2])));
	int sessions = atoi(argv[4]);
	pthread_t *threads = calloc((size_t)sessions, sizeof *threads);
	double began = now();
	for (int i = 0; i < sessions; i++) pthread_create(&threads[i], NULL, work, NULL);
	struct timespec rest = {atoi(argv[5]) / 1000, atoi(argv[5]) % 1000 * 1000000L};
	nanosleep(&rest, NULL);
	double rate = (double)pairs / (now() - began);
	stop = 1;
	for (int i = 0; i < sessions; i++) pthread_join(threads[i], NULL);
	printf("%.0f\n", rate);
	return 0;
}
