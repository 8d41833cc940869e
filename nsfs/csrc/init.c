/*
 * nsfs-init - PID 1 of a container.
 *
 *   nsfs-init FLAGS      FLAGS: `c` there is a cgroup namespace, `s` be a subreaper (no PID namespace of its own),
 *                        `l` have syslog(2) answered by the daemon, `d` deny it
 *
 * It reaps, and it forks commands for those who connect to its socket: a command forked from inside is in
 * every namespace, cgroup and limit at once.  It is executed by the spawner after the user namespace was
 * entered, from a file of mode 0111 that belongs to a user who is not mapped: so nobody inside can trace
 * it, or see its descriptors or its memory.  All signals are blocked, so they are ignored from inside; SIGKILL
 * comes from outside only.  It reads nothing that members can write.
 *
 * Two threads.  The first has the cgroup namespace rooted at ID/payload, as everybody expects of PID 1,
 * and sleeps.  The second stays in the spawner's cgroup namespace and does all the work, because where cgroups
 * are mounted with `nsdelegate` clone3(CLONE_INTO_CGROUP) asks that both the caller's group (ID/init) and the
 * new one (ID/payload) be visible in the caller's cgroup namespace (cgroup_procs_write_permission()).
 *
 * Memory is what a thousand containers pay for, and page faults what every mkdir waits for: so nothing of the C
 * library is used but its headers, and whatever is large is on pages which only the child ever touches: it
 * is the child that receives a command's message.
 */
/* The first would look for a secret where the C library was to have put one; the second makes calls of strlen,
 * memset, memcpy out of what is here in their place. */
#pragma GCC optimize("no-stack-protector", "no-tree-loop-distribute-patterns")
#define _GNU_SOURCE
#include <asm/unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <asm/ioctls.h>
#include <linux/close_range.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "protocol.h"
#include "syslogfilter.h"

/* --- in place of a C library --- */

/* A system call: its result or -errno. */
#if defined(__x86_64__)
static long call(long number, long a, long b, long c, long d, long e)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	long result;

	__asm__ volatile("syscall" : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
			 : "rcx", "r11", "memory");
	return result;
}
#elif defined(__aarch64__)
static long call(long number, long a, long b, long c, long d, long e)
{
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;

	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory");
	return x0;
}
#else
#error "how this architecture makes a system call is not known"
#endif

#define CALL_(n, a, b, c, d, e, ...) \
	call(__NR_##n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e))
#define CALL(...) CALL_(__VA_ARGS__, 0, 0, 0, 0, 0, 0)

__attribute__((noreturn))
static void leave(int status)
{
	for (;;)
		CALL(exit_group, status);
}

/* crt1.o calls it on aarch64, and the C library's would bring all of that along. */
__attribute__((noreturn))
void abort(void)
{
	leave(1);
}

/* These are also what the compiler itself calls. */
void *memset(void *to, int value, size_t size);
void *memcpy(void *to, const void *from, size_t size);

void *memset(void *to, int value, size_t size)
{
	for (char *byte = to; size--; byte++)
		*byte = (char)value;
	return to;
}

void *memcpy(void *to, const void *from, size_t size)
{
	const char *source = from;

	for (char *byte = to; size--; byte++)
		*byte = *source++;
	return to;
}

static size_t length_of(const char *string)
{
	size_t length = 0;

	while (string[length])
		length++;
	return length;
}

static bool has_char(const char *string, char wanted)
{
	for (; *string; string++)
		if (*string == wanted)
			return true;
	return false;
}

/* --- state --- */

#define CONNECTIONS_MAX 512	/* further ones wait in the backlog; each session holds one */
#define GIVEN_MAX 448		/* of them in the hands of session programs; the rest is always for the daemon */
#define COMMANDS_MAX 512	/* whose status is remembered; the oldest that ended is forgotten first */

struct connection {
	int fd;
	bool unproven;		/* commands only from who may be the container's root */
	bool given;		/* to a session program */
	bool hangup;		/* its end is the command's end of session */
	uint64_t token;		/* 0: has not said anything yet; else waits for that command */
};

struct command {
	uint64_t token;		/* 0: free */
	pid_t pid;		/* 0: ended */
	int status;
	uint32_t ended;		/* in which order */
};

static struct connection connections[CONNECTIONS_MAX];
static size_t connection_count;
static struct command commands[COMMANDS_MAX];
static uint32_t ended_count;
static bool has_cgroup_ns, own_pid_ns;
static int signal_fd;
static bool revoking;

/* Returns 0 in the child, else its PID or -errno. */
static long fork_into(int flags, int cgroup_fd)
{
	struct clone_args args = {
		.flags = (uint64_t)(unsigned int)flags | CLONE_INTO_CGROUP,
		.exit_signal = SIGCHLD,
		.cgroup = (uint64_t)(unsigned int)cgroup_fd,
	};

	return CALL(clone3, &args, sizeof(args));
}

static long send_to(int fd, const void *data, size_t size)
{
	return CALL(sendto, fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT, NULL);
}

/* --- in the child --- */

static char message[INIT_MESSAGE_MAX];
static char *words[INIT_ARGS_MAX + 2];

/* Tell why a command cannot start; error: -errno. */
__attribute__((noreturn))
static void fail(int connection_fd, uint32_t step, long error)
{
	const struct init_reply reply = { .op = INIT_FAILED, .error = (int32_t)error, .step = step };

	(void)send_to(connection_fd, &reply, sizeof(reply));
	leave(error == -ENOENT ? 127 : 126);
}

static const char *find_path(char *const *environment)
{
	for (; *environment; environment++)
		if ((*environment)[0] == 'P' && (*environment)[1] == 'A' && (*environment)[2] == 'T' &&
		    (*environment)[3] == 'H' && (*environment)[4] == '=')
			return *environment + 5;
	return "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
}

/* As execvpe(3), but for scripts without `#!`; returns -errno. */
static long execute(char *const *argv, char *const *environment)
{
	const char *path = find_path(environment);
	const size_t name = length_of(argv[0]);
	long error = -ENOENT, result;
	char file[4096];

	if (has_char(argv[0], '/'))
		return CALL(execve, argv[0], argv, environment);
	for (;; path++) {
		size_t length = 0;

		for (; *path && *path != ':'; path++)
			if (length < sizeof(file) - 1)
				file[length++] = *path;
		if (name && length + name + 2 <= sizeof(file)) {
			/* An empty element is the working directory. */
			if (length)
				file[length++] = '/';
			memcpy(file + length, argv[0], name + 1);
			result = CALL(execve, file, argv, environment);
			/* One that may not be executed is told about only if no other is found. */
			if (result == -EACCES)
				error = result;
			else if (result != -ENOENT && result != -ENOTDIR)
				return result;
		}
		if (!*path)
			return error;
	}
}

/* Receive the descriptors and bytes of a command; returns how many bytes. */
static size_t receive(int connection_fd, int *fds, size_t *fd_count)
{
	union {
		char buffer[CMSG_SPACE(sizeof(int) * INIT_FDS_MAX)];
		struct cmsghdr align;
	} control;
	struct iovec iov = { .iov_base = message, .iov_len = sizeof(message) - 1 };
	struct msghdr header = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control.buffer, .msg_controllen = sizeof(control.buffer),
	};
	const struct cmsghdr *rights = &control.align;
	long length = CALL(recvmsg, connection_fd, &header, MSG_CMSG_CLOEXEC);

	*fd_count = 0;
	if (length < 0)
		fail(connection_fd, STEP_REQUEST, length);
	if (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
		fail(connection_fd, STEP_REQUEST, -E2BIG);
	if (header.msg_controllen >= sizeof(*rights) && rights->cmsg_level == SOL_SOCKET &&
	    rights->cmsg_type == SCM_RIGHTS) {
		*fd_count = (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(fds, CMSG_DATA(rights), *fd_count * sizeof(int));
	}
	return (size_t)length;
}

/* Give the command the descriptors 0, 1, ... and no other.  The connection stays, close-on-exec. */
static long place_fds(int *connection_fd, const int *fds, size_t fd_count)
{
	long high[INIT_FDS_MAX], moved, result;
	size_t i;

	/* First out of the way: what was received may itself have a low number. */
	moved = CALL(fcntl, *connection_fd, F_DUPFD_CLOEXEC, 64);
	if (moved < 0)
		return moved;
	*connection_fd = (int)moved;
	for (i = 0; i < fd_count; i++) {
		high[i] = CALL(fcntl, fds[i], F_DUPFD_CLOEXEC, 64);
		if (high[i] < 0)
			return high[i];
	}
	for (i = 0; i < fd_count; i++) {
		result = CALL(dup3, high[i], i, 0);
		if (result < 0)
			return result;
	}
	result = CALL(close_range, fd_count, 63, 0);
	return result < 0 ? result : CALL(close_range, 64, ~0U, CLOSE_RANGE_CLOEXEC);
}

/* Move a descriptor out of the way of 0, 1 and 2; passes errors on. */
static long raise_fd(long fd)
{
	const long high = fd < 0 ? fd : CALL(fcntl, fd, F_DUPFD_CLOEXEC, 64);

	if (fd >= 0)
		CALL(close, fd);
	return high;
}

/* A pipe; the end that the command has is number `fd`, the other is returned. */
static long open_pipe(int fd)
{
	int ends[2];
	const long result = CALL(pipe2, ends, O_CLOEXEC);
	long inner, outer;

	if (result < 0)
		return result;
	inner = raise_fd(ends[fd ? 1 : 0]);
	outer = raise_fd(ends[fd ? 0 : 1]);
	if (inner < 0 || outer < 0)
		return inner < 0 ? inner : outer;
	return CALL(dup3, inner, fd, 0) < 0 ? -EBADF : outer;
}

/* A terminal of the container's own as 0, 1 and 2; returns its other end. */
static long open_terminal(const struct init_terminal *terminal)
{
	const long master = raise_fd(CALL(openat, AT_FDCWD, "/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC));
	const int unlocked = 0;
	long slave, result;
	int fd;

	if (master < 0)
		return master;
	if ((result = CALL(ioctl, master, TIOCSPTLCK, &unlocked)))
		return result;
	/* Not by a path: whatever is in /dev/pts is the members' doing. */
	slave = raise_fd(CALL(ioctl, master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC));
	if (slave < 0)
		return slave;
	if (terminal->termios[0] | terminal->termios[4] | terminal->termios[12])
		(void)CALL(ioctl, slave, TCSETS, terminal->termios);
	(void)CALL(ioctl, slave, TIOCSWINSZ, terminal->size);
	for (fd = 0; fd < 3; fd++)
		if (CALL(dup3, slave, fd, 0) < 0)
			return -EBADF;
	return (result = CALL(ioctl, 0, TIOCSCTTY, 0)) ? result : master;
}

/* Make 0, 1 and 2 here, so that nothing of outside gets in, and send the other ends out. */
static long open_stdio(int connection_fd, uint32_t flags, const struct init_terminal *terminal)
{
	struct init_reply opened = { .op = INIT_OPENED };
	union {
		char buffer[CMSG_SPACE(sizeof(int) * 3)];
		struct cmsghdr align;
	} control;
	struct iovec iov = { .iov_base = &opened, .iov_len = sizeof(opened) };
	struct msghdr header = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buffer };
	int outer[3];
	unsigned int count = 0;
	long result = -EINVAL;

	if (flags & INIT_OPEN_TERMINAL) {
		result = open_terminal(terminal);
		outer[count++] = (int)result;
		if (result >= 0 && flags & INIT_OPEN_ERROR) {
			result = open_pipe(2);
			outer[count++] = (int)result;
		}
	} else {
		for (int fd = 0; fd < 3 && (!fd || result >= 0); fd++) {
			result = open_pipe(fd);
			outer[count++] = (int)result;
		}
	}
	if (result < 0)
		return result;
	header.msg_controllen = CMSG_SPACE(sizeof(int) * count);
	memset(control.buffer, 0, sizeof(control.buffer));
	control.align = (struct cmsghdr){ .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS,
		.cmsg_len = CMSG_LEN(sizeof(int) * count) };
	memcpy(CMSG_DATA(&control.align), outer, sizeof(int) * count);
	result = CALL(sendmsg, connection_fd, &header, MSG_NOSIGNAL);
	return result < 0 ? result : 0;
}

__attribute__((noreturn))
static void command(int connection_fd)
{
	const struct init_reply started = { .op = INIT_STARTED };
	const uint64_t no_signals = 0;
	struct init_request request = { .op = 0 };
	int fds[INIT_FDS_MAX];
	uint32_t groups[INIT_GROUPS_MAX];
	struct init_terminal terminal = { .size = { 0 } };
	size_t length, fd_count, i, at;
	char *directory, **argv, **environment;
	long result;

	length = receive(connection_fd, fds, &fd_count);
	memcpy(&request, message, sizeof(request));
	at = sizeof(request);
	if (length < at || request.argc < 1 || request.groups > INIT_GROUPS_MAX ||
	    request.argc > INIT_ARGS_MAX || request.envc > INIT_ARGS_MAX - request.argc ||
	    length - at < request.groups * sizeof(*groups))
		fail(connection_fd, STEP_REQUEST, -EINVAL);
	memcpy(groups, message + at, request.groups * sizeof(*groups));
	at += request.groups * sizeof(*groups);
	if (request.flags & INIT_OPEN_TERMINAL) {
		if (length - at < sizeof(terminal))
			fail(connection_fd, STEP_REQUEST, -EINVAL);
		memcpy(&terminal, message + at, sizeof(terminal));
		at += sizeof(terminal);
	}
	if (request.flags & (INIT_OPEN_TERMINAL | INIT_OPEN_PIPES))
		fd_count = 0;
	message[length] = '\0';
	directory = message + at;
	/* words[]: argv, NULL, environment, NULL */
	argv = words;
	environment = words + request.argc + 1;
	for (i = 0; i <= request.argc + request.envc; i++) {
		if (at >= length)
			fail(connection_fd, STEP_REQUEST, -EINVAL);
		if (i)
			words[i - 1 + (i > request.argc)] = message + at;
		at += length_of(message + at) + 1;
	}

	/* Told before anything can fail or be slow, so that whoever asked can kill it. */
	if (send_to(connection_fd, &started, sizeof(started)) < 0)
		leave(126);
	if (has_cgroup_ns && (result = CALL(setns, INIT_CGROUP_NS_FD, CLONE_NEWCGROUP)))
		fail(connection_fd, STEP_CGROUP, result);
	result = place_fds(&connection_fd, fds, fd_count);
	if (result < 0)
		fail(connection_fd, STEP_STDIO, result);
	if (!(request.flags & INIT_SAME_SESSION) && (result = CALL(setsid)) < 0)
		fail(connection_fd, STEP_TERMINAL, result);
	if (request.flags & INIT_TERMINAL && (result = CALL(ioctl, 0, TIOCSCTTY, 0)))
		fail(connection_fd, STEP_TERMINAL, result);
	/* setgroups may be denied in the namespace; none at all is what we have already. */
	if ((request.groups && (result = CALL(setgroups, request.groups, groups))) ||
	    (request.gid && (result = CALL(setresgid, request.gid, request.gid, request.gid))) ||
	    (request.uid && (result = CALL(setresuid, request.uid, request.uid, request.uid))))
		fail(connection_fd, STEP_IDENTITY, result);
	/* A change of credentials sets this to fs.suid_dumpable, which may be 1. */
	(void)CALL(prctl, PR_SET_DUMPABLE, 0);
	/* Not before: what is made here belongs to the command's user. */
	if (request.flags & (INIT_OPEN_TERMINAL | INIT_OPEN_PIPES) &&
	    (result = open_stdio(connection_fd, request.flags, &terminal)))
		fail(connection_fd, STEP_TERMINAL, result);
	result = CALL(chdir, directory);
	if (result)
		fail(connection_fd, STEP_DIRECTORY, result);
	(void)CALL(rt_sigprocmask, SIG_SETMASK, &no_signals, NULL, sizeof(no_signals));
	result = execute(argv, environment);
	if (request.flags & INIT_SHELL && (result == -ENOENT || result == -EACCES || result == -ENOTDIR)) {
		argv[0] = (char *)"/bin/sh";
		result = execute(argv, environment);
	}
	fail(connection_fd, STEP_EXEC, result);
}

/* --- in the init --- */

static struct command *find(uint64_t token)
{
	for (size_t i = 0; i < COMMANDS_MAX; i++)
		if (commands[i].token == token)
			return &commands[i];
	return NULL;
}

/* A place for one more command: a free one, else that of the one which ended first. */
static struct command *place(void)
{
	struct command *oldest = find(0);

	if (oldest)
		return oldest;
	for (size_t i = 0; i < COMMANDS_MAX; i++)
		if (!commands[i].pid && (!oldest || commands[i].ended < oldest->ended))
			oldest = &commands[i];
	return oldest;
}

/* Close a connection; another takes its place. */
static void forget(size_t index)
{
	CALL(close, connections[index].fd);
	connections[index] = connections[--connection_count];
}

static void reply_and_close(size_t index, struct init_reply reply)
{
	char unread;

	/* What was only looked at must be gone, or closing would take back the reply (ECONNRESET). */
	(void)CALL(recvfrom, connections[index].fd, &unread, sizeof(unread), MSG_DONTWAIT, NULL);
	(void)send_to(connections[index].fd, &reply, sizeof(reply));
	forget(index);
}

static void tell(struct command *ended)
{
	for (size_t i = 0; i < connection_count; i++)
		if (connections[i].token == ended->token) {
			reply_and_close(i, (struct init_reply){
				.op = INIT_EXITED, .status = ended->status });
			ended->token = 0;
			return;
		}
}

static void reap(void)
{
	int status;
	long pid;

	while ((pid = CALL(wait4, -1, &status, WNOHANG | (unsigned int)__WALL, NULL)) > 0)
		for (size_t i = 0; i < COMMANDS_MAX; i++)
			if (commands[i].token && commands[i].pid == pid) {
				commands[i].pid = 0;
				commands[i].status = status;
				commands[i].ended = ++ended_count;
				tell(&commands[i]);
				break;
			}
}

static void start(size_t index, const struct init_request *request)
{
	struct command *kept = NULL;
	long pid;

	if (request->flags & INIT_KEEP_STATUS) {
		kept = request->token && !find(request->token) ? place() : NULL;
		if (!kept) {
			reply_and_close(index, (struct init_reply){
				.op = INIT_FAILED, .step = STEP_LIMIT, .error = -EAGAIN });
			return;
		}
	}
	pid = fork_into(0, INIT_PAYLOAD_FD);
	if (!pid)
		command(connections[index].fd);
	if (pid < 0) {
		reply_and_close(index, (struct init_reply){
			.op = INIT_FAILED, .step = STEP_CLONE, .error = (int32_t)pid });
		return;
	}
	if (kept)
		*kept = (struct command){ .token = request->token, .pid = (pid_t)pid };
	/* From here on it is the child's alone, so that its exec is seen as end-of-file. */
	forget(index);
}

/* Look at the next request; returns its length or -errno.  `root`: the sender may be the container's root. */
static long peek(const struct connection *from, struct init_request *request, bool *root)
{
	union {
		char buffer[CMSG_SPACE(sizeof(struct ucred))];
		struct cmsghdr align;
	} control;
	struct iovec iov = { .iov_base = request, .iov_len = sizeof(*request) };
	struct msghdr header = {
		.msg_iov = &iov, .msg_iovlen = 1,
		/* Only where the credentials come first and fill it: into room that is left the kernel would put
		 * duplicates of the command's descriptors. */
		.msg_control = control.buffer,
		.msg_controllen = from->unproven ? sizeof(control.buffer) : 0,
	};
	const long length = CALL(recvmsg, from->fd, &header, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	struct ucred sender;

	*root = false;
	if (length > 0 && header.msg_controllen >= CMSG_LEN(sizeof(sender)) &&
	    control.align.cmsg_level == SOL_SOCKET && control.align.cmsg_type == SCM_CREDENTIALS) {
		memcpy(&sender, CMSG_DATA(&control.align), sizeof(sender));
		*root = !sender.uid && !sender.gid;
	}
	return length;
}

/* A signal for a command somebody waits for; 0: the connection has ended. */
static void pass_signal(const struct connection *from, int number, bool group)
{
	const struct command *to = find(from->token);

	if (!to || !to->pid)
		return;
	if (number) {
		(void)CALL(kill, group ? -to->pid : to->pid, number);
	} else if (from->hangup) {
		(void)CALL(kill, -to->pid, SIGHUP);
		(void)CALL(kill, -to->pid, SIGCONT);
	}
}

static size_t given_count(void)
{
	size_t count = 0;

	for (size_t i = 0; i < connection_count; i++)
		count += connections[i].given;
	return count;
}

static void hear(size_t index)
{
	struct connection *each = &connections[index];
	struct init_request request;
	bool root;
	long length;

	if (revoking && each->given && !each->token)
		return;
	/* Only looked at: what follows is received by the child, together with the descriptors. */
	length = peek(each, &request, &root);
	if (length == -EAGAIN)
		return;
	if (length == sizeof(request) && !each->token && request.op == INIT_EXEC && (root || !each->unproven)) {
		start(index, &request);
	} else if (length == sizeof(request) && !each->token && request.op == INIT_EXEC) {
		reply_and_close(index, (struct init_reply){
			.op = INIT_FAILED, .step = STEP_IDENTITY, .error = -EPERM });
	} else if (length == sizeof(request) && !each->given && request.op == INIT_REVOKE) {
		(void)CALL(recvfrom, each->fd, &request, sizeof(request), MSG_DONTWAIT, NULL);
		/* It is closed with the others, and so told. */
		each->given = revoking = true;
	} else if (length == sizeof(request) && !each->given && !each->token &&
		   (request.op == INIT_GIVE || request.op == INIT_PROVE)) {
		const int on = 1;

		(void)CALL(recvfrom, each->fd, &request, sizeof(request), MSG_DONTWAIT, NULL);
		if (given_count() >= GIVEN_MAX) {
			forget(index);
			return;
		}
		each->given = true;
		each->unproven = request.op == INIT_PROVE;
		if (each->unproven)
			(void)CALL(setsockopt, each->fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof(on));
	} else if (length == sizeof(request) && each->token && request.op == INIT_SIGNAL) {
		(void)CALL(recvfrom, each->fd, &request, sizeof(request), MSG_DONTWAIT, NULL);
		if (request.token > 0 && request.token <= 64)
			pass_signal(each, (int)request.token, request.flags & INIT_GROUP);
	} else if (length == sizeof(request) && !each->token && request.op == INIT_WAIT && request.token) {
		struct command *asked = find(request.token);

		(void)CALL(recvfrom, each->fd, &request, sizeof(request), MSG_DONTWAIT, NULL);
		each->token = request.token;
		each->hangup = request.flags & INIT_HANGUP;
		if (!asked)
			reply_and_close(index, (struct init_reply){
				.op = INIT_FAILED, .step = STEP_PROCESS, .error = -ESRCH });
		else if (!asked->pid)
			tell(asked);
	} else {
		if (each->token)
			pass_signal(each, 0, true);
		forget(index);
	}
}

/* From the end: one that goes is replaced by the last. */
static void close_given(void)
{
	revoking = false;
	for (size_t i = connection_count; i-- > 0;)
		if (connections[i].given && !connections[i].token)
			forget(i);
}

/* The directory of the socket is root's alone; this is for a descriptor that strayed.  In a PID namespace of
 * our own all who are not in it have PID 0. */
static bool from_outside(int fd)
{
	struct ucred peer;
	socklen_t length = sizeof(peer);

	return !CALL(getsockopt, fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) &&
	       (!own_pid_ns || !peer.pid);
}

/* The second thread: the loop.  Nothing that fails here ends it. */
__attribute__((noreturn, used))
static void serve(void)
{
	struct pollfd polled[2 + CONNECTIONS_MAX];

	for (;;) {
		const size_t count = connection_count;
		size_t i;

		polled[0] = (struct pollfd){ .fd = signal_fd, .events = POLLIN };
		polled[1] = (struct pollfd){
			.fd = count < CONNECTIONS_MAX ? INIT_LISTEN_FD : -1, .events = POLLIN };
		for (i = 0; i < count; i++)
			polled[2 + i] = (struct pollfd){ .fd = connections[i].fd, .events = POLLIN };
		if (CALL(ppoll, polled, 2 + count, NULL, NULL) < 0)
			continue;
		/* From the end: one that goes is replaced by the last. */
		for (i = count; i-- > 0;)
			if (polled[2 + i].revents)
				hear(i);
		if (revoking)
			close_given();
		if (polled[0].revents) {
			struct signalfd_siginfo info;

			(void)CALL(read, signal_fd, &info, sizeof(info));
			reap();
		}
		if (polled[1].revents) {
			const long fd = CALL(accept4, INIT_LISTEN_FD, NULL, NULL, SOCK_CLOEXEC);

			if (fd >= 0 && from_outside((int)fd))
				connections[connection_count++] = (struct connection){ .fd = (int)fd };
			else if (fd >= 0)
				CALL(close, fd);
		}
	}
}

/* --- syslog(2): whoever is in the container inherits this filter --- */

static long filter_syslog(uint32_t action, unsigned int flags)
{
	/* Other architectures the denylist knows, which is asked as well. */
	const struct sock_filter filter[] = { SYSLOG_FILTER(action) };
	const struct sock_fprog program = { .len = sizeof(filter) / sizeof(filter[0]),
		.filter = (struct sock_filter *)filter };

	return CALL(seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
}

/* Without SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV: a wait for the next record is to be ended by any signal, and by the
 * freezer, as the kernel's own is. */
static long redirect_syslog(void)
{
	const long fd = filter_syslog(SECCOMP_RET_USER_NOTIF, SECCOMP_FILTER_FLAG_NEW_LISTENER);
	long result;

	/* EBUSY: whoever started nsfs has a listener already, and there can be one only. */
	if (fd == -EBUSY)
		return filter_syslog(SECCOMP_RET_ERRNO | EPERM, 0);
	if (fd < 0 || fd == INIT_SYSLOG_FD)
		return fd < 0 ? fd : 0;
	result = CALL(dup3, fd, INIT_SYSLOG_FD, O_CLOEXEC);
	CALL(close, fd);
	return result < 0 ? result : 0;
}

/* Start the second thread; returns its ID or -errno. */
static long start_thread(void)
{
	static char stack[32768] __attribute__((aligned(16)));
	const long flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM;
	long result;

	/* The new thread has the registers, but nothing on its stack: so it goes on from here by itself. */
#if defined(__x86_64__)
	__asm__ volatile("syscall\n\t"
			 "test %%rax, %%rax\n\t"
			 "jnz 1f\n\t"
			 "xor %%ebp, %%ebp\n\t"
			 "call *%[serve]\n"
			 "1:"
			 : "=a"(result)
			 : "a"((long)__NR_clone), "D"(flags), "S"(stack + sizeof(stack)),
			   [serve] "r"(serve)
			 : "rcx", "r11", "memory");
#else
	register long x8 __asm__("x8") = __NR_clone;
	register long x0 __asm__("x0") = flags;
	register char *x1 __asm__("x1") = stack + sizeof(stack);

	__asm__ volatile("svc 0\n\t"
			 "cbnz x0, 1f\n\t"
			 "mov x29, xzr\n\t"
			 "blr %[serve]\n"
			 "1:"
			 : "+r"(x0) : "r"(x8), "r"(x1), [serve] "r"(serve) : "memory", "x30");
	result = x0;
#endif
	return result;
}

__attribute__((noreturn))
static void ready(uint32_t step, long error)
{
	const struct init_result result = { .error = (int32_t)error, .step = step };

	/* With the spawner gone nobody will ever know of this container. */
	if (CALL(write, INIT_READY_FD, &result, sizeof(result)) != sizeof(result) || error)
		leave(1);
	CALL(close, INIT_READY_FD);
	for (;;)
		CALL(ppoll, NULL, 0, NULL, NULL);
}

__attribute__((noreturn))
static void run(const char *flags)
{
	const uint64_t sigchld = 1ULL << (SIGCHLD - 1);
	long result;

	/* Signals are blocked since before the spawner made us. */
	(void)CALL(prctl, PR_SET_DUMPABLE, 0);
	own_pid_ns = CALL(getpid) == 1;
	if (has_char(flags, 's') && (result = CALL(prctl, PR_SET_CHILD_SUBREAPER, 1)))
		ready(STEP_EXEC, result);
	has_cgroup_ns = has_char(flags, 'c');
	/* One who connected and left at once must not make us wait for the next. */
	if ((result = CALL(fcntl, INIT_LISTEN_FD, F_SETFL, O_NONBLOCK)))
		ready(STEP_EXEC, result);
	/* Before there is another thread to have it, or another descriptor of that number. */
	if (has_char(flags, 'l') && (result = redirect_syslog()))
		ready(STEP_FILTER, result);
	if (has_char(flags, 'd') && (result = filter_syslog(SECCOMP_RET_ERRNO | EPERM, 0)))
		ready(STEP_FILTER, result);
	result = CALL(signalfd4, -1, &sigchld, sizeof(sigchld), SFD_CLOEXEC | SFD_NONBLOCK);
	if (result < 0)
		ready(STEP_LIMIT, result);
	signal_fd = (int)result;
	result = start_thread();
	if (result < 0)
		ready(STEP_CLONE, result);
	if (has_cgroup_ns && (result = CALL(setns, INIT_CGROUP_NS_FD, CLONE_NEWCGROUP)))
		ready(STEP_CGROUP, result);
	ready(STEP_NONE, 0);
}

/* The program is linked as any other, but this takes the place of the C library's start-up code, which would set
 * up what is not used here and touch a dozen pages.  crt1.o calls it. */
int __libc_start_main(int (*start)(int, char **), int argc, char **argv);

int __libc_start_main(int (*start)(int, char **), int argc, char **argv)
{
	return start(argc, argv);
}

int main(int argc, char **argv)
{
	run(argc > 1 ? argv[1] : "");
}
