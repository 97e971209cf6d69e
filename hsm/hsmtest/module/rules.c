/* Reads the rules and does what they say: see rules.h. */
#define _GNU_SOURCE
#include "rules.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define CKR_DEVICE_ERROR 0x30UL
#define MAX_RULES 64 /* as in ../rules.go */

struct rule {
	char function[32];
	long skip, count, sleep_ms;
	enum { MAKE, ANSWER, SEGV, ABORT, EXIT, HANG } end;
	unsigned long value; /* of ANSWER and EXIT */
};

/* Set by open_rules, once. */
static char rules_path[PATH_MAX];
static int calls = -1;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards all below */
static struct timespec read_at = {-1, 0};
static struct rule rules[MAX_RULES];
static int rule_count;
static struct modes modes;
static int connected; /* between C_Initialize and C_Finalize */
static int lost;      /* dead, until C_Finalize */

void complain(const char *format, ...) {
	va_list arguments;
	va_start(arguments, format);
	fputs("fault module: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
}

/* number takes what is decimal, or hexadecimal after 0x. */
static unsigned long number(const char *text) {
	char *rest = NULL;
	errno = 0;
	unsigned long n = strtoul(text, &rest, strncmp(text, "0x", 2) ? 10 : 16);
	if (errno || rest == text || *rest) {
		complain("%s is no number", text);
		abort();
	}
	return n;
}

/* value gives what stands after name in a word, or NULL. */
static const char *value(const char *word, const char *name) {
	size_t n = strlen(name);
	return strncmp(word, name, n) ? NULL : word + n;
}

static void read_word(struct rule *r, const char *word) {
	const char *v;
	if ((v = value(word, "skip="))) r->skip = (long)number(v);
	else if ((v = value(word, "count="))) r->count = (long)number(v);
	else if ((v = value(word, "sleep_ms="))) r->sleep_ms = (long)number(v);
	else if ((v = value(word, "rv="))) r->end = ANSWER, r->value = number(v);
	else if ((v = value(word, "exit="))) r->end = EXIT, r->value = number(v);
	else if (!strcmp(word, "segv")) r->end = SEGV;
	else if (!strcmp(word, "abort")) r->end = ABORT;
	else if (!strcmp(word, "hang")) r->end = HANG;
	else {
		complain("a rule has %s", word);
		abort();
	}
}

static void read_line(char *line) {
	char *save = NULL, *word = strtok_r(line, " \n", &save);
	if (!word) return;
	if (!strcmp(word, "dead")) modes.dead = 1;
	else if (!strcmp(word, "no-slots")) modes.no_slots = 1;
	else if (!strcmp(word, "lossy")) modes.lossy = 1;
	else if (!strcmp(word, "logged-out")) modes.logged_out = 1;
	else if (!strcmp(word, "boast")) modes.boasts = 1, modes.boast = number(strtok_r(NULL, " \n", &save));
	else if (!strcmp(word, "slots")) modes.slots = number(strtok_r(NULL, " \n", &save));
	else if (!strcmp(word, "ill")) snprintf(modes.ill, sizeof modes.ill, "%s", strtok_r(NULL, " \n", &save));
	else if (!strcmp(word, "ill-wraps")) snprintf(modes.ill_wraps, sizeof modes.ill_wraps, "%s", strtok_r(NULL, " \n", &save));
	else if (!strcmp(word, "ill-opens")) snprintf(modes.ill_opens, sizeof modes.ill_opens, "%s", strtok_r(NULL, " \n", &save));
	else if (!strcmp(word, "reused")) snprintf(modes.reused, sizeof modes.reused, "%s", strtok_r(NULL, " \n", &save));
	else if (!strcmp(word, "ill-code")) modes.ill_code = number(strtok_r(NULL, " \n", &save));
	else if (!strcmp(word, "ill-sleep")) modes.ill_sleep_ms = (long)number(strtok_r(NULL, " \n", &save));
	else if (!strcmp(word, "iv")) snprintf(modes.iv, sizeof modes.iv, "%s", strtok_r(NULL, " \n", &save));
	else {
		if (rule_count == MAX_RULES) {
			complain("more than %d rules", MAX_RULES);
			abort();
		}
		struct rule *r = &rules[rule_count++];
		*r = (struct rule){.count = -1};
		snprintf(r->function, sizeof r->function, "%s", word);
		while ((word = strtok_r(NULL, " \n", &save))) read_word(r, word);
	}
}

static void read_rules(void) {
	struct stat s;
	if (stat(rules_path, &s)) return; /* the test has ended */
	if (s.st_mtim.tv_sec == read_at.tv_sec && s.st_mtim.tv_nsec == read_at.tv_nsec) return;
	FILE *f = fopen(rules_path, "re");
	if (!f) return;
	/* Of the file that was opened: another may be there by now. */
	if (!fstat(fileno(f), &s)) read_at = s.st_mtim;
	rule_count = 0, modes = (struct modes){0};
	char line[256];
	while (fgets(line, sizeof line, f)) read_line(line);
	fclose(f);
}

static void note(const char *function) {
	char line[64];
	int n = snprintf(line, sizeof line, "%s\n", function);
	if (write(calls, line, (size_t)n) == n) return;
	complain("a call of %s is not noted: %s", function, strerror(errno));
	abort();
}

/* apply finds the rule for a call. */
static struct rule apply(const char *function) {
	for (int i = 0; i < rule_count; i++) {
		struct rule *r = &rules[i];
		if (strcmp(r->function, "*") && strcmp(r->function, function)) continue;
		if (r->skip > 0) { r->skip--; continue; }
		if (r->count == 0) continue;
		if (r->count > 0) r->count--;
		return *r;
	}
	return (struct rule){.end = MAKE};
}

void rest(long ms) {
	struct timespec until;
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += ms / 1000, until.tv_nsec += ms % 1000 * 1000000L;
	if (until.tv_nsec >= 1000000000L) until.tv_sec++, until.tv_nsec -= 1000000000L;
	/* Runtimes interrupt their threads. */
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR) {}
}

int begin(const char *function, struct modes *now, ck_rv *rv) {
	note(function);
	pthread_mutex_lock(&lock);
	read_rules();
	*now = modes;
	if (modes.dead && connected) lost = 1;
	int finalize = !strcmp(function, "C_Finalize");
	struct rule r = {.end = ANSWER, .value = CKR_DEVICE_ERROR};
	if (finalize || (!modes.dead && !lost)) r = apply(function);
	if (finalize && r.end == MAKE) connected = lost = 0;
	pthread_mutex_unlock(&lock);
	if (r.sleep_ms) rest(r.sleep_ms);
	volatile int *volatile nowhere = NULL;
	switch (r.end) {
	case MAKE: return 1;
	case ANSWER: *rv = r.value; return 0;
	case SEGV: *nowhere = 1; break;
	case ABORT: abort();
	case EXIT: _exit((int)r.value);
	case HANG: for (;;) pause();
	}
	return 0;
}

void connection(void) {
	pthread_mutex_lock(&lock);
	connected = 1;
	pthread_mutex_unlock(&lock);
}

void logged_in(void) {
	pthread_mutex_lock(&lock);
	modes.logged_out = 0;
	pthread_mutex_unlock(&lock);
}

int open_rules(const char *directory) {
	char path[PATH_MAX];
	if (snprintf(rules_path, sizeof rules_path, "%s/rules", directory) >= PATH_MAX || snprintf(path, sizeof path, "%s/calls", directory) >= PATH_MAX) return 0;
	calls = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
	if (calls < 0) complain("%s: %s", path, strerror(errno));
	return calls >= 0;
}
