/* The rules of the fault module; ../rules.go describes them. */
#ifndef KMSAGENT_RULES_H
#define KMSAGENT_RULES_H

#include "cryptoki.h"

/* The rules that are not of one function. */
struct modes {
	int dead, no_slots, lossy;
	int logged_out;     /* and nobody has called C_Login since */
	int boasts;         /* whether boast is set */
	unsigned long boast; /* what every length and count says */
	unsigned long slots; /* how much is added to the numbers of slots */
	char iv[16];
	char reused[64]; /* whose key has the handles of those that are no more */
	char ill[64]; /* what ails: keys whose label has it */
	char ill_wraps[64]; /* the same for encryption alone */
	char ill_opens[64]; /* and for decryption alone */
	unsigned long ill_code; /* what is answered then; 0: a code of a vendor's */
	long ill_sleep_ms; /* and after how long */
};

/* open_rules takes the rules and the file for calls of a directory. It returns 0, and
 * has complained, where it cannot. */
int open_rules(const char *directory);

/* begin notes a call and does what the rules say of it. It returns 1 where the call is
 * to be made, and sets the modes as they are then; else it sets rv. */
int begin(const char *function, struct modes *now, ck_rv *rv);

/* rest waits. */
void rest(long ms);

/* connection says that C_Initialize went well. */
void connection(void);

/* logged_in says that C_Login was called. */
void logged_in(void);

/* complain writes a line for whoever reads the test's output. */
__attribute__((format(printf, 1, 2))) void complain(const char *format, ...);

#endif
