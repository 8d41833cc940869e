/*
 * session.h - the command of a session in a whole container, as its init is asked for it (INIT_EXEC).
 *
 * By nsfs-enter, of its own environment; by nsfs-tracer, which has the shell of an ln(1) started while that still becomes
 * nsfs-enter, of the ln's.
 */
#ifndef NSFS_SESSION_H
#define NSFS_SESSION_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "protocol.h"

/* All that gets in of the environment; everything else that the command finds is ENVIRONMENT. */
static const char *const PASSED[] = {
	"TERM", "COLORTERM", "NO_COLOR", "TZ", "LANG", "LANGUAGE", "LC_ALL", "LC_ADDRESS", "LC_COLLATE", "LC_CTYPE",
	"LC_IDENTIFICATION", "LC_MEASUREMENT", "LC_MESSAGES", "LC_MONETARY", "LC_NAME", "LC_NUMERIC", "LC_PAPER",
	"LC_TELEPHONE", "LC_TIME" };
static const char *const ENVIRONMENT[] = {
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "USER=root",
	"LOGNAME=root", "container=nsfs" };

static char message[INIT_MESSAGE_MAX];
static size_t message_length;	/* more than fits: it did not */

static void append(const void *data, size_t size)
{
	if (message_length + size <= sizeof(message))
		memcpy(message + message_length, data, size);
	message_length += size;
}

static void append_string(const char *string)
{
	append(string, strlen(string) + 1);
}

/* Compose the message, with what is in `environ`; command: NULL for the user's shell; terminal: with INIT_OPEN_TERMINAL.
 * Returns 0 or E2BIG. */
static int compose(uint64_t token, uint32_t flags, const struct init_terminal *terminal, char *const *command)
{
	struct init_request request = { .op = INIT_EXEC, .token = token, .flags = INIT_KEEP_STATUS | flags };
	const char *shell = getenv("SHELL"), *value;
	size_t i;

	message_length = sizeof(request);
	if (terminal)
		append(terminal, sizeof(*terminal));
	append_string("/");
	for (i = 0; command && command[i]; i++, request.argc++)
		append_string(command[i]);
	if (!command) {
		append_string(shell && *shell == '/' ? shell : "/bin/sh");
		request.flags |= INIT_SHELL;
		request.argc = 1;
	}
	for (i = 0; i < sizeof(ENVIRONMENT) / sizeof(*ENVIRONMENT); i++, request.envc++)
		append_string(ENVIRONMENT[i]);
	for (i = 0; i < sizeof(PASSED) / sizeof(*PASSED); i++) {
		value = getenv(PASSED[i]);
		if (!value)
			continue;
		append(PASSED[i], strlen(PASSED[i]));
		append("=", 1);
		append_string(value);
		request.envc++;
	}
	memcpy(message, &request, sizeof(request));
	/* One byte less than there is: the init puts a NUL behind it. */
	return message_length >= sizeof(message) || request.argc + request.envc > INIT_ARGS_MAX ? E2BIG : 0;
}

#endif
