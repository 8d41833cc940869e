/*
 * nsfs-init - PID 1 of a container.
 *
 *   nsfs-init FLAGS      FLAGS: `c` make a cgroup namespace, `s` be a subreaper (no PID namespace of its own)
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
 * Memory is what a thousand containers pay for: no stdio, no malloc, and whatever is large is on pages
 * which only the child ever touches: it is the child that receives a command's message.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/sched.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "protocol.h"

#define CONNECTIONS_MAX 128	/* further ones wait in the backlog */
#define COMMANDS_MAX 256	/* whose status is remembered; the oldest that ended is forgotten first */

struct connection {
	int fd;
	uint64_t token;		/* 0: has not said anything yet; else waits for that command */
};

struct command {
	uint64_t token;		/* 0: free */
	pid_t pid;		/* 0: ended */
	int status;
	uint32_t ended;		/* in which order */
};

static struct connection connections[CONNECTIONS_MAX];
static nfds_t connection_count;
static struct command commands[COMMANDS_MAX];
static uint32_t ended_count;
static bool has_cgroup_ns;

static long fork_into(int flags, int cgroup_fd)
{
	struct clone_args args = {
		.flags = (uint64_t)(unsigned int)flags | CLONE_INTO_CGROUP,
		.exit_signal = SIGCHLD,
		.cgroup = (uint64_t)(unsigned int)cgroup_fd,
	};

	return syscall(SYS_clone3, &args, sizeof(args));
}

/* --- in the child --- */

static char message[INIT_MESSAGE_MAX];
static char *words[INIT_ARGS_MAX + 2];
static uint32_t groups[INIT_GROUPS_MAX];

__attribute__((noreturn))
static void fail(int connection_fd, uint32_t step, int error)
{
	const struct init_reply reply = { .op = INIT_FAILED, .error = -error, .step = step };

	(void)send(connection_fd, &reply, sizeof(reply), MSG_NOSIGNAL);
	_exit(error == ENOENT ? 127 : 126);
}

static const char *variable(char *const *environment, const char *name)
{
	size_t length = strlen(name);

	for (; *environment; environment++)
		if (!strncmp(*environment, name, length) && (*environment)[length] == '=')
			return *environment + length + 1;
	return NULL;
}

/* As execvpe(3), but for scripts without `#!`; returns the errno. */
static int execute(char *const *argv, char *const *environment)
{
	const char *path = variable(environment, "PATH"), *end;
	size_t name = strlen(argv[0]);
	int error = ENOENT;
	char file[4096];

	if (strchr(argv[0], '/')) {
		execve(argv[0], argv, environment);
		return errno;
	}
	if (!path)
		path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
	for (;; path = end + 1) {
		size_t length;

		end = strchrnul(path, ':');
		length = (size_t)(end - path);
		if (name && length + name + 2 <= sizeof(file)) {
			memcpy(file, path, length);
			file[length] = '/';
			memcpy(file + length + (length > 0), argv[0], name + 1);
			execve(file, argv, environment);
			/* One that may not be executed is told about only if no other is found. */
			if (errno == EACCES)
				error = EACCES;
			else if (errno != ENOENT && errno != ENOTDIR)
				return errno;
		}
		if (!*end)
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
	ssize_t length = recvmsg(connection_fd, &header, MSG_CMSG_CLOEXEC);
	struct cmsghdr *each;

	*fd_count = 0;
	if (length < 0)
		fail(connection_fd, STEP_REQUEST, errno);
	if (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
		fail(connection_fd, STEP_REQUEST, E2BIG);
	for (each = CMSG_FIRSTHDR(&header); each; each = CMSG_NXTHDR(&header, each))
		if (each->cmsg_level == SOL_SOCKET && each->cmsg_type == SCM_RIGHTS) {
			*fd_count = (each->cmsg_len - CMSG_LEN(0)) / sizeof(int);
			memcpy(fds, CMSG_DATA(each), *fd_count * sizeof(int));
		}
	return (size_t)length;
}

/* Give the command the descriptors 0, 1, ... and no other.  The connection stays, close-on-exec. */
static int place_fds(int *connection_fd, const int *fds, size_t fd_count)
{
	int high[INIT_FDS_MAX], moved;
	size_t i;

	/* First out of the way: what was received may itself have a low number. */
	moved = fcntl(*connection_fd, F_DUPFD_CLOEXEC, 64);
	if (moved < 0)
		return -errno;
	*connection_fd = moved;
	for (i = 0; i < fd_count; i++) {
		high[i] = fcntl(fds[i], F_DUPFD_CLOEXEC, 64);
		if (high[i] < 0)
			return -errno;
	}
	for (i = 0; i < fd_count; i++)
		if (dup2(high[i], (int)i) < 0)
			return -errno;
	if (syscall(SYS_close_range, (unsigned int)fd_count, 63, 0) < 0 ||
	    syscall(SYS_close_range, 64, ~0U, CLOSE_RANGE_CLOEXEC) < 0)
		return -errno;
	return 0;
}

__attribute__((noreturn))
static void command(int connection_fd)
{
	const struct init_reply started = { .op = INIT_STARTED };
	struct init_request request;
	int fds[INIT_FDS_MAX], error;
	size_t length, fd_count, i, at;
	char *directory, **argv, **environment;
	const uint64_t none = 0;

	length = receive(connection_fd, fds, &fd_count);
	memcpy(&request, message, sizeof(request));
	at = sizeof(request);
	if (length < at || request.argc < 1 || request.groups > INIT_GROUPS_MAX ||
	    request.argc > INIT_ARGS_MAX || request.envc > INIT_ARGS_MAX - request.argc ||
	    length - at < request.groups * sizeof(*groups))
		fail(connection_fd, STEP_REQUEST, EINVAL);
	memcpy(groups, message + at, request.groups * sizeof(*groups));
	at += request.groups * sizeof(*groups);
	message[length] = '\0';
	directory = message + at;
	argv = words;
	environment = words + request.argc + 1;
	for (i = 0; i <= request.argc + request.envc; i++) {
		/* words[]: argv, NULL, environment, NULL */
		if (i)
			words[i - 1 + (i > request.argc)] = message + at;
		if (at >= length)
			fail(connection_fd, STEP_REQUEST, EINVAL);
		at += strlen(message + at) + 1;
	}

	/* Told before anything can fail or be slow, so that whoever asked can kill it. */
	if (send(connection_fd, &started, sizeof(started), MSG_NOSIGNAL) < 0)
		_exit(126);
	if (has_cgroup_ns && setns(INIT_CGROUP_NS_FD, CLONE_NEWCGROUP))
		fail(connection_fd, STEP_CGROUP, errno);
	error = -place_fds(&connection_fd, fds, fd_count);
	if (error)
		fail(connection_fd, STEP_STDIO, error);
	if (!(request.flags & INIT_SAME_SESSION) && setsid() < 0)
		fail(connection_fd, STEP_TERMINAL, errno);
	if (request.flags & INIT_TERMINAL && ioctl(0, TIOCSCTTY, 0))
		fail(connection_fd, STEP_TERMINAL, errno);
	/* setgroups may be denied in the namespace; none at all is what we have already. */
	if (request.groups && syscall(SYS_setgroups, request.groups, groups))
		fail(connection_fd, STEP_IDENTITY, errno);
	if ((request.gid && syscall(SYS_setresgid, request.gid, request.gid, request.gid)) ||
	    (request.uid && syscall(SYS_setresuid, request.uid, request.uid, request.uid)))
		fail(connection_fd, STEP_IDENTITY, errno);
	/* A change of credentials sets this to fs.suid_dumpable, which may be 1. */
	(void)prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	if (chdir(directory))
		fail(connection_fd, STEP_DIRECTORY, errno);
	/* Raw, and so with those that the C library keeps to itself. */
	(void)syscall(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, sizeof(none));
	fail(connection_fd, STEP_EXEC, execute(argv, environment));
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

static void reply_and_close(size_t index, struct init_reply reply)
{
	(void)send(connections[index].fd, &reply, sizeof(reply), MSG_NOSIGNAL | MSG_DONTWAIT);
	close(connections[index].fd);
	connections[index] = connections[--connection_count];
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
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG | __WALL)) > 0)
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
			.op = INIT_FAILED, .step = STEP_CLONE, .error = -errno });
		return;
	}
	if (kept)
		*kept = (struct command){ .token = request->token, .pid = (pid_t)pid };
	/* From here on it is the child's alone, so that its exec is seen as end-of-file. */
	close(connections[index].fd);
	connections[index] = connections[--connection_count];
}

static void hear(size_t index)
{
	struct connection *each = &connections[index];
	struct init_request request;
	ssize_t length;

	/* Only looked at: what follows is received by the child, together with the descriptors. */
	length = recv(each->fd, &request, sizeof(request), MSG_PEEK | MSG_DONTWAIT);
	if (length < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (length == sizeof(request) && !each->token && request.op == INIT_EXEC) {
		start(index, &request);
		return;
	}
	if (length == sizeof(request) && !each->token && request.op == INIT_WAIT && request.token) {
		struct command *asked = find(request.token);

		(void)recv(each->fd, &request, sizeof(request), MSG_DONTWAIT);
		if (!asked) {
			reply_and_close(index, (struct init_reply){
				.op = INIT_FAILED, .step = STEP_PROCESS, .error = -ESRCH });
			return;
		}
		each->token = request.token;
		if (!asked->pid)
			tell(asked);
		return;
	}
	close(each->fd);
	connections[index] = connections[--connection_count];
}

/* The directory of the socket is root's alone; this is for a descriptor that strayed.  In a PID namespace of
 * our own all who are not in it have PID 0. */
static bool from_outside(int fd, bool own_pid_ns)
{
	struct ucred peer;
	socklen_t length = sizeof(peer);

	return !getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) &&
	       (!own_pid_ns || !peer.pid);
}

static int signal_fd;

/* The second thread: the loop.  Nothing that fails here ends it. */
__attribute__((noreturn))
static int serve(void *unused)
{
	struct pollfd polled[2 + CONNECTIONS_MAX];
	const bool own_pid_ns = getpid() == 1;

	(void)unused;
	for (;;) {
		nfds_t count = connection_count, i;

		polled[0] = (struct pollfd){ .fd = signal_fd, .events = POLLIN };
		polled[1] = (struct pollfd){
			.fd = count < CONNECTIONS_MAX ? INIT_LISTEN_FD : -1, .events = POLLIN };
		for (i = 0; i < count; i++)
			polled[2 + i] = (struct pollfd){ .fd = connections[i].fd, .events = POLLIN };
		if (poll(polled, 2 + count, -1) < 0)
			continue;
		/* From the end: one that goes is replaced by the last. */
		for (i = count; i-- > 0;)
			if (polled[2 + i].revents)
				hear(i);
		if (polled[0].revents) {
			struct signalfd_siginfo info;

			(void)read(signal_fd, &info, sizeof(info));
			reap();
		}
		if (polled[1].revents) {
			int fd = accept4(INIT_LISTEN_FD, NULL, NULL, SOCK_CLOEXEC);

			if (fd >= 0 && from_outside(fd, own_pid_ns))
				connections[connection_count++] = (struct connection){ .fd = fd };
			else if (fd >= 0)
				close(fd);
		}
	}
}

/* Make a cgroup namespace rooted at ID/payload and hold it as INIT_CGROUP_NS_FD: a child born there makes it,
 * shares our descriptors, and opens its own. */
static int make_cgroup_ns(void)
{
	long pid = fork_into(CLONE_FILES | CLONE_VFORK, INIT_PAYLOAD_FD);
	int status, fd;

	if (!pid) {
		if (unshare(CLONE_NEWCGROUP))
			_exit(errno);
		fd = open("/proc/self/ns/cgroup", O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			_exit(errno);
		if (fd != INIT_CGROUP_NS_FD && dup3(fd, INIT_CGROUP_NS_FD, O_CLOEXEC) < 0)
			_exit(errno);
		if (fd != INIT_CGROUP_NS_FD)
			close(fd);
		_exit(0);
	}
	if (pid < 0)
		return -errno;
	if (waitpid((pid_t)pid, &status, __WALL) < 0)
		return -errno;
	if (!WIFEXITED(status))
		return -EIO;
	return -WEXITSTATUS(status);
}

__attribute__((noreturn))
static void ready(uint32_t step, int error)
{
	const struct init_result result = { .error = error, .step = step };

	/* With the spawner gone nobody will ever know of this container. */
	if (write(INIT_READY_FD, &result, sizeof(result)) != sizeof(result) || error)
		_exit(1);
	close(INIT_READY_FD);
	for (;;)
		pause();
}

int main(int argc, char **argv)
{
	static char stack[32768] __attribute__((aligned(16)));
	const char *flags = argc > 1 ? argv[1] : "";
	sigset_t child;
	int error;

	/* Signals are blocked since before the spawner was. */
	(void)prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	(void)prctl(PR_SET_NAME, "nsfs-init", 0, 0, 0);
	if (strchr(flags, 's') && prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
		ready(STEP_EXEC, -errno);
	if (strchr(flags, 'c')) {
		error = make_cgroup_ns();
		if (error)
			ready(STEP_CGROUP, error);
		has_cgroup_ns = true;
	}
	/* One who connected and left at once must not make us wait for the next. */
	if (fcntl(INIT_LISTEN_FD, F_SETFL, O_NONBLOCK))
		ready(STEP_EXEC, -errno);
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	signal_fd = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signal_fd < 0)
		ready(STEP_LIMIT, -errno);
	if (clone(serve, stack + sizeof(stack),
		  CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM,
		  NULL) < 0)
		ready(STEP_CLONE, -errno);
	/* The other thread shares errno with us: it has not been asked for anything yet. */
	if (has_cgroup_ns && setns(INIT_CGROUP_NS_FD, CLONE_NEWCGROUP))
		ready(STEP_CGROUP, -errno);
	ready(STEP_NONE, 0);
}
