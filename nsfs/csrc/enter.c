/*
 * nsfs-enter - a session in a container, as its user sees it.
 *
 *   nsfs-enter [--only LIST] [--ssh] C [--only LIST] [-- COMMAND [ARGUMENT]...]
 *   nsfs-enter --channel FD NAME         in place of an ln(1): started by nsfs-tracer
 *   -nsfs-enter, nsfs-enter -c COMMAND   as a login shell: the container that is called like the user
 *
 *   C: a container; below /sys/namespaces unless it begins with `/`, `./` or `../`
 *   --ssh: the command is that of $SSH_ORIGINAL_COMMAND, for sshd's ForceCommand
 *
 * It runs outside, as the user, and stays outside.  The command is forked inside by the container's init, with a
 * terminal or pipes made inside; their other ends come here, and are relayed to whatever descriptors 0, 1 and 2
 * are.  So no descriptor, no memory and nothing of the environment but PASSED below gets in.
 *
 * Entering: setxattr(2) of ENTER_ATTRIBUTE of C/procs to the number of a descriptor, one end of a socketpair, the channel:
 * the daemon takes that and answers by it with a struct entry_offer.  Whether the caller may is the kernel's to say, twice: it must be
 * allowed to write to the directory C/procs, and to become the root of the container's user namespace: what it sends to
 * the init goes with SCM_CREDENTIALS of that root, from within the user namespace if need be.
 *
 * In part (--only) the init is not involved: a child of ours joins these namespaces with our own credentials.  With
 * `syslog` it installs a filter of its own for syslog(2), whose listener the daemon gets, and we keep.
 *
 * Exit status: the command's; 128+n when signal n ended it; 125 nsfs failed, 126 not to be executed, 127 not found.
 *
 * References: pty(7), termios(3), unix(7), setns(2), credentials(7).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/magic.h>
#include <linux/mount.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <termios.h>
#include <unistd.h>

#include "protocol.h"
#include "session.h"
#include "syslogfilter.h"

#define TREE "/sys/namespaces/"
#define ENTER_ATTRIBUTE "user.nsfs.enter"
#define INITIAL_USER_INO 0xeffffffdU	/* include/linux/proc_ns.h: PROC_USER_INIT_INO */
#define CHUNK 4096	/* what a pipe that polls writable takes without blocking (pipe(7)) */
#define LOOK_MS 200	/* how soon a session in the background sees that it no longer is */
#define LAST_WORDS_MS 100	/* how long the terminal of a session that has ended may still say something */
#define OFFER_FDS_MAX 10	/* eight namespaces, two logs */
#define N(array) (sizeof(array) / sizeof((array)[0]))

enum { FAILED = 125, NOT_EXECUTABLE = 126, NOT_FOUND = 127 };

/* In the order of their bits. */
static const struct { int type; const char *name; } TYPES[] = {
	{ CLONE_NEWTIME, "time" }, { CLONE_NEWNS, "mnt" }, { CLONE_NEWCGROUP, "cgroup" }, { CLONE_NEWUTS, "uts" },
	{ CLONE_NEWIPC, "ipc" }, { CLONE_NEWUSER, "user" }, { CLONE_NEWPID, "pid" }, { CLONE_NEWNET, "net" } };

/* What can be in the way of the session's end comes as one of these; all others do to us what they do. */
static const int FORWARDED[] = {
	SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH, SIGCONT, SIGTSTP };

struct stream {
	int from_fd, to_fd;	/* -1: ended */
	bool inward;		/* from outside to inside */
	bool in_step;		/* of a file: read on only when all that was read before has been taken */
	size_t start, end;	/* what is in data and not written yet */
	char data[16 * CHUNK];
};

static const char *name = "";	/* of the container, for messages */
static char **own_words, **command;
static bool on_terminal;	/* 0 and 1 are one, so there is one inside */
static struct termios outer_mode, raw_mode;
static bool is_raw;
static int guardian_fd = -1;
static pid_t guardian;
static int master_fd = -1;	/* of the terminal inside */
static int said_fd = -1;	/* where the command's failure to start is told: struct init_reply */
static int wait_fd = -1;	/* whole: the connection on which the init tells the end */
static pid_t child;		/* in part */
static int child_fd = -1;	/* its pidfd */
static int listener_fd = -1;	/* in the child: of its filter */
static struct stream streams[3];
static size_t stream_count;

/* --- leaving --- */

static void set_raw(bool raw)
{
	if (!on_terminal || raw == is_raw)
		return;
	while (tcsetattr(STDIN_FILENO, TCSADRAIN, raw ? &raw_mode : &outer_mode) && errno == EINTR)
		;
	is_raw = raw;
}

__attribute__((noreturn))
static void leave(int code)
{
	set_raw(false);
	if (guardian > 0) {
		(void)!write(guardian_fd, "", 1);
		while (waitpid(guardian, NULL, 0) < 0 && errno == EINTR)
			;
	}
	_exit(code);
}

__attribute__((noreturn, format(printf, 2, 3)))
static void fail(int code, const char *format, ...)
{
	va_list arguments;
	char text[1024];

	va_start(arguments, format);
	vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	set_raw(false);
	dprintf(STDERR_FILENO, "nsfs: %s%s%s\n", name, *name ? ": " : "", text);
	leave(code);
}

static int exit_code(int status)
{
	return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* --- the terminal outside --- */

/* Whether the terminal is ours to read and to set.  Where it controls nobody, yes. */
static bool in_foreground(void)
{
	const pid_t group = tcgetpgrp(STDIN_FILENO);

	return group < 0 || group == getpgrp();
}

/* A process that puts the terminal right should we be killed by what nobody can catch. */
static void start_guardian(void)
{
	struct termios now;
	int ends[2];
	char byte;

	raw_mode = outer_mode;
	cfmakeraw(&raw_mode);
	/* Errors that go elsewhere pass no terminal inside that would end their lines properly. */
	if (!isatty(STDERR_FILENO))
		raw_mode.c_oflag = outer_mode.c_oflag;
	if (pipe2(ends, O_CLOEXEC))
		return;
	guardian = fork();
	if (!guardian) {
		sigset_t all;

		sigfillset(&all);
		sigprocmask(SIG_SETMASK, &all, NULL);
		prctl(PR_SET_NAME, "nsfs-terminal");
		(void)dup2(ends[0], 3);
		syscall(SYS_close_range, 4, ~0U, 0);
		(void)close(STDOUT_FILENO);
		(void)close(STDERR_FILENO);
		/* A shell that has noticed first, and set it as it likes, needs no help. */
		if (read(3, &byte, 1) == 0 && !tcgetattr(STDIN_FILENO, &now) &&
		    now.c_lflag == raw_mode.c_lflag && now.c_iflag == raw_mode.c_iflag)
			(void)tcsetattr(STDIN_FILENO, TCSANOW, &outer_mode);
		_exit(0);
	}
	/* Who kills our process group, as a shell's `kill %1` does, does not mean it. */
	if (guardian > 0)
		(void)setpgid(guardian, guardian);
	close(ends[0]);
	guardian_fd = ends[1];
}

/* The terminal is ours now.  At first, if it was another's when we began: it may have been set to whatever a shell reads
 * its lines with, and so may ours inside. */
static void take_terminal(void)
{
	struct termios now, inner;

	if (!guardian) {
		if (!tcgetattr(STDIN_FILENO, &now)) {
			if (!tcgetattr(master_fd, &inner) && inner.c_lflag == outer_mode.c_lflag &&
			    inner.c_iflag == outer_mode.c_iflag)
				(void)tcsetattr(master_fd, TCSANOW, &now);
			outer_mode = now;
		}
		start_guardian();
	}
	set_raw(true);
}

static void pass_size(void)
{
	struct winsize size;

	if (master_fd >= 0 && !ioctl(STDIN_FILENO, TIOCGWINSZ, &size))
		(void)ioctl(master_fd, TIOCSWINSZ, &size);
}

/* --- messages with descriptors --- */

/* Returns the length, or -1; at most `count` descriptors are taken, the rest of fds is -1. */
static ssize_t receive(int socket_fd, void *data, size_t size, int *fds, size_t count)
{
	union {
		char buffer[CMSG_SPACE(sizeof(int) * OFFER_FDS_MAX)];
		struct cmsghdr align;
	} control;
	struct iovec iov = { .iov_base = data, .iov_len = size };
	struct msghdr header = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control.buffer, .msg_controllen = sizeof(control.buffer) };
	struct cmsghdr *each;
	ssize_t length;

	for (size_t i = 0; i < count; i++)
		fds[i] = -1;
	do
		length = recvmsg(socket_fd, &header, MSG_CMSG_CLOEXEC);
	while (length < 0 && errno == EINTR);
	for (each = length < 0 ? NULL : CMSG_FIRSTHDR(&header); each; each = CMSG_NXTHDR(&header, each))
		if (each->cmsg_level == SOL_SOCKET && each->cmsg_type == SCM_RIGHTS) {
			const size_t got = (each->cmsg_len - CMSG_LEN(0)) / sizeof(int);

			memcpy(fds, CMSG_DATA(each), (got < count ? got : count) * sizeof(int));
		}
	return length;
}

static int send_fds(int socket_fd, const void *data, size_t size, const int *fds, size_t count)
{
	union {
		char buffer[CMSG_SPACE(sizeof(int) * 8)];
		struct cmsghdr align;
	} control = { .buffer = "" };
	struct iovec iov = { .iov_base = (void *)(uintptr_t)data, .iov_len = size };
	struct msghdr header = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (count) {
		header.msg_control = control.buffer;
		header.msg_controllen = CMSG_SPACE(sizeof(int) * count);
		control.align.cmsg_level = SOL_SOCKET;
		control.align.cmsg_type = SCM_RIGHTS;
		control.align.cmsg_len = CMSG_LEN(sizeof(int) * count);
		memcpy(CMSG_DATA(&control.align), fds, sizeof(int) * count);
	}
	return sendmsg(socket_fd, &header, MSG_NOSIGNAL) < 0 ? -errno : 0;
}

/* With the word of the kernel that we may be this user in our user namespace; returns 0 or -errno. */
static int send_as(int socket_fd, const void *data, size_t size, uid_t uid, gid_t gid)
{
	union {
		char buffer[CMSG_SPACE(sizeof(struct ucred))];
		struct cmsghdr align;
	} control = { .buffer = "" };
	const struct ucred claimed = { .pid = getpid(), .uid = uid, .gid = gid };
	struct iovec iov = { .iov_base = (void *)(uintptr_t)data, .iov_len = size };
	struct msghdr header = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control.buffer, .msg_controllen = sizeof(control.buffer) };

	control.align.cmsg_level = SOL_SOCKET;
	control.align.cmsg_type = SCM_CREDENTIALS;
	control.align.cmsg_len = CMSG_LEN(sizeof(claimed));
	memcpy(CMSG_DATA(&control.align), &claimed, sizeof(claimed));
	return sendmsg(socket_fd, &header, MSG_NOSIGNAL) < 0 ? -errno : 0;
}

/* --- the whole container: by its init --- */

static struct init_terminal terminal_now(void)
{
	struct init_terminal terminal = { .size = { 0 } };
	unsigned char mode[64] = { 0 };	/* the kernel's struct termios, which has no name here */
	struct winsize size;

	if (!ioctl(STDIN_FILENO, TCGETS, mode))
		memcpy(terminal.termios, mode, sizeof(terminal.termios));
	if (!ioctl(STDIN_FILENO, TIOCGWINSZ, &size))
		memcpy(terminal.size, &size, sizeof(terminal.size));
	return terminal;
}

static uint32_t stdio_flags(void)
{
	if (!on_terminal)
		return INIT_OPEN_PIPES;
	return INIT_OPEN_TERMINAL | (isatty(STDERR_FILENO) ? 0 : INIT_OPEN_ERROR);
}

/* The user namespace of this process, by its inode; 0 when that cannot be seen. */
static ino_t own_user_ns(void)
{
	struct stat st;

	return stat("/proc/self/ns/user", &st) ? 0 : st.st_ino;
}

/* Send the command to the init as one who may be the container's root. */
static int send_command(int to_fd, int user_fd, const struct entry_offer *offer)
{
	const ino_t own = own_user_ns();
	struct stat wanted;
	pid_t pid;
	int status;

	if (offer->root_uid == ENTRY_NO_PROOF)
		return send(to_fd, message, message_length, MSG_NOSIGNAL) < 0 ? -errno : 0;
	if (fstat(user_fd, &wanted))
		return -errno;
	if (own == wanted.st_ino)
		return send_as(to_fd, message, message_length, 0, 0);
	if (own == INITIAL_USER_INO &&
	    !send_as(to_fd, message, message_length, offer->root_uid, offer->root_gid))
		return 0;
	pid = fork();
	if (!pid) {
		if (setns(user_fd, CLONE_NEWUSER))
			_exit(errno);
		_exit(-send_as(to_fd, message, message_length, 0, 0));
	}
	if (pid < 0)
		return -errno;
	while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	return WIFEXITED(status) ? -WEXITSTATUS(status) : -EIO;
}

static void start_whole(const struct entry_offer *offer, const int *fds)
{
	struct init_request wait = { .op = INIT_WAIT, .flags = INIT_HANGUP };
	struct init_reply reply;
	int error;

	if (getrandom(&wait.token, sizeof(wait.token), 0) != sizeof(wait.token))
		fail(FAILED, "getrandom: %s", strerror(errno));
	wait.token |= 1;
	said_fd = fds[1];
	wait_fd = fds[2];
	if (offer->token) {
		/* The tracer had it begun, without a terminal. */
		wait.token = offer->token;
		on_terminal = false;
	} else {
		struct init_terminal terminal;

		if (on_terminal)
			terminal = terminal_now();
		error = -compose(wait.token, stdio_flags(), on_terminal ? &terminal : NULL, command);
		if (!error)
			error = send_command(said_fd, fds[0], offer);
		if (error)
			fail(FAILED, "%s", strerror(-error));
	}
	close(fds[0]);
	/* First that it has begun: before, the init may not know of it. */
	if (receive(said_fd, &reply, sizeof(reply), NULL, 0) != sizeof(reply))
		fail(FAILED, "%s", strerror(ENODEV));
	if (reply.op == INIT_FAILED)
		fail(FAILED, "%s", strerror(-reply.error));
	if (send(wait_fd, &wait, sizeof(wait), MSG_NOSIGNAL) < 0)
		fail(FAILED, "%s", strerror(errno));
}

/* --- in part: a child of ours --- */

__attribute__((noreturn))
static void refuse(int to_fd, uint32_t step, int error)
{
	const struct init_reply reply = { .op = INIT_FAILED, .error = -error, .step = step };

	(void)send_fds(to_fd, &reply, sizeof(reply), NULL, 0);
	_exit(step == STEP_EXEC ? (error == ENOENT ? NOT_FOUND : NOT_EXECUTABLE) : FAILED);
}

/* As nsenter(1): in the order of need, since the user namespace may give or take the right to join the others. */
static int join(uint32_t types, const int *fds)
{
	uint32_t left = types & ~(uint32_t)CLONE_NEWUSER;
	int error = 0;

	for (int round = 0; round < 2; round++) {
		size_t n = 0;

		error = 0;
		for (size_t i = 0; i < N(TYPES); i++) {
			const uint32_t type = (uint32_t)TYPES[i].type;

			if (!(types & type))
				continue;
			if (left & type) {
				if (!setns(fds[n], TYPES[i].type))
					left &= ~type;
				else
					error = errno;
			}
			n++;
		}
		if (!(types & CLONE_NEWUSER) || round)
			break;
		n = 0;
		for (size_t i = 0; TYPES[i].type != CLONE_NEWUSER; i++)
			n += (types & (uint32_t)TYPES[i].type) != 0;
		if (setns(fds[n], CLONE_NEWUSER))
			return errno;
	}
	if (!error && types & CLONE_NEWUSER && (setgroups(0, NULL) && errno != EPERM))
		return errno;
	if (!error && types & CLONE_NEWUSER && (setresgid(0, 0, 0) || setresuid(0, 0, 0)))
		return errno;
	return error;
}

/* Mount a tree, and let go of it. */
static int put(int tree_fd, const char *path)
{
	int result = 0;

	if (tree_fd < 0 || syscall(SYS_move_mount, tree_fd, "", AT_FDCWD, path, 4 /* MOVE_MOUNT_F_EMPTY_PATH */))
		result = errno;
	if (tree_fd >= 0)
		close(tree_fd);
	return result;
}

struct kept {
	char path[256];
	int fd;
};

/* Hold what is mounted below /sys and is no sysfs, to be mounted there again. */
static size_t keep_mounts(struct kept *kept, size_t most)
{
	FILE *file = fopen("/proc/self/mountinfo", "re");
	char line[4096], path[256], kind[32];
	size_t count = 0;

	while (file && count < most && fgets(line, sizeof(line), file)) {
		const char *dash = strstr(line, " - ");
		size_t i, length;

		if (!dash || sscanf(line, "%*s %*s %*s %*s %255s", path) != 1 ||
		    sscanf(dash, " - %31s", kind) != 1 || strncmp(path, "/sys/", 5) || !strcmp(kind, "sysfs"))
			continue;
		for (i = 0; i < count; i++) {
			length = strlen(kept[i].path);
			if (!strncmp(kept[i].path, path, length) && (path[length] == '/' || !path[length]))
				break;
		}
		if (i < count)
			continue;
		kept[count].fd = (int)syscall(SYS_open_tree, AT_FDCWD, path,
					      OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
		if (kept[count].fd < 0)
			continue;
		memcpy(kept[count++].path, path, sizeof(path));
	}
	if (file)
		fclose(file);
	return count;
}

/* A mount namespace for this session alone. */
static int own_mounts(void)
{
	static bool done;

	if (!done && (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL)))
		return errno;
	done = true;
	return 0;
}

/* /sys shows the network namespace of whoever mounted it: mount it afresh, for this session alone. */
static int renew_sys(void)
{
	static const char *const depend[] = { "/sys/class", "/sys/devices" };
	int clones[N(depend)] = { -1, -1 };
	struct kept kept[64];
	const int fs_fd = (int)syscall(SYS_fsopen, "sysfs", 1 /* FSOPEN_CLOEXEC */);
	size_t count, i;
	struct statfs st;
	int fd, error = 0;

	if (fs_fd < 0 || syscall(SYS_fsconfig, fs_fd, 6 /* FSCONFIG_CMD_CREATE */, NULL, NULL, 0))
		return errno;
	fd = (int)syscall(SYS_fsmount, fs_fd, 1 /* FSMOUNT_CLOEXEC */, 14 /* nosuid, nodev, noexec */);
	close(fs_fd);
	if (fd < 0 || (error = own_mounts()))
		return fd < 0 ? errno : error;
	if (statfs("/sys", &st))
		return errno;
	if (st.f_type == SYSFS_MAGIC) {
		count = keep_mounts(kept, N(kept));
		error = put(fd, "/sys");
		for (i = 0; i < count && !error; i++)
			(void)put(kept[i].fd, kept[i].path);
		return error;
	}
	/* nsfs's own graft: a tmpfs that binds every entry.  Only these two depend on the network namespace.  (For a
	 * while over the whole: what is not mounted cannot be cloned before Linux 6.15.) */
	error = put(fd, "/sys");
	for (i = 0; i < N(depend) && !error; i++)
		clones[i] = (int)syscall(SYS_open_tree, AT_FDCWD, depend[i], OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
	if (error || umount2("/sys", MNT_DETACH))
		return error ? error : errno;
	for (i = 0; i < N(depend) && !error; i++)
		error = put(clones[i], depend[i]);
	return error;
}

static size_t count_types(uint32_t types)
{
	size_t count = 0;

	for (size_t i = 0; i < N(TYPES); i++)
		count += (types & (uint32_t)TYPES[i].type) != 0;
	return count;
}

/* The container's log in place of ours: the devices, unless its mounts were joined, and syslog(2).  For that it takes
 * CAP_SYS_ADMIN in the user namespace that we are in. */
static int take_log(const int *logs, bool joined_mounts)
{
	static const char *const paths[] = { "/dev/kmsg", "/proc/kmsg" };
	const struct sock_filter filter[] = { SYSLOG_FILTER(SECCOMP_RET_USER_NOTIF) };
	const struct sock_fprog program = { .len = N(filter), .filter = (struct sock_filter *)(uintptr_t)filter };
	int error;

	if (!joined_mounts && (error = own_mounts()))
		return error;
	for (size_t i = 0; i < N(paths) && !joined_mounts; i++)
		if (syscall(SYS_move_mount, logs[i], "", AT_FDCWD, paths[i], 4 /* MOVE_MOUNT_F_EMPTY_PATH */) &&
		    errno != ENOENT)
			return errno;
	listener_fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
	return listener_fd < 0 ? errno : 0;
}

/* As the init does it, inside. */
static int open_stdio(int to_fd)
{
	const struct init_reply opened = { .op = INIT_OPENED };
	int outer[4], inner[3] = { -1, -1, -1 }, ends[2], unlocked = 0;
	size_t count = 0;
	struct init_terminal terminal;

	for (int i = 0; i < 3; i++) {
		if (on_terminal && (i < 2 || isatty(STDERR_FILENO)))
			continue;
		if (pipe2(ends, O_CLOEXEC))
			return errno;
		inner[i] = ends[i ? 1 : 0];
		outer[on_terminal ? 1 : count] = ends[i ? 0 : 1];
		count++;
	}
	if (on_terminal) {
		const int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
		int slave;

		if (master < 0 || ioctl(master, TIOCSPTLCK, &unlocked))
			return errno;
		slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
		if (slave < 0)
			return errno;
		terminal = terminal_now();
		(void)ioctl(slave, TCSETS, terminal.termios);
		(void)ioctl(slave, TIOCSWINSZ, terminal.size);
		outer[0] = master;
		count++;
		inner[0] = inner[1] = slave;
		if (inner[2] < 0)
			inner[2] = slave;
		if (ioctl(slave, TIOCSCTTY, 0))
			return errno;
	}
	if (listener_fd >= 0)
		outer[count++] = listener_fd;
	if (send_fds(to_fd, &opened, sizeof(opened), outer, count))
		return EPIPE;
	for (int i = 0; i < 3; i++)
		if (dup2(inner[i], i) < 0)
			return errno;
	return 0;
}

/* Our command line names the container as it is called outside, and members see it by /proc once we are in their PID
 * namespace; that cannot be helped by PR_SET_DUMPABLE. */
static int hide_arguments(void)
{
	size_t count = 0;
	char **copies;

	while (command && command[count])
		count++;
	if (command) {
		copies = calloc(count + 1, sizeof(*copies));
		for (size_t i = 0; copies && i < count; i++)
			if (!(copies[i] = strdup(command[i])))
				return ENOMEM;
		if (!copies)
			return ENOMEM;
		command = copies;
	}
	for (char **each = own_words; *each; each++)
		memset(*each, 0, strlen(*each));
	return 0;
}

__attribute__((noreturn))
static void run_in_part(int to_fd, int channel_fd, uint32_t types, const int *fds)
{
	const char *shell = getenv("SHELL");
	char *own[] = { (char *)(uintptr_t)(shell && *shell == '/' ? shell : "/bin/sh"), NULL };
	char *passed[N(PASSED) + N(ENVIRONMENT) + 1] = { NULL };
	struct entry_offer go;
	size_t count = 0;
	sigset_t none;
	int error, status;
	pid_t pid;

	if ((error = hide_arguments()))
		refuse(to_fd, STEP_LIMIT, error);
	error = join(types, fds);
	if (error)
		refuse(to_fd, STEP_JOIN, error);
	if (types & CLONE_NEWNET && !(types & CLONE_NEWNS) && (error = renew_sys()))
		refuse(to_fd, STEP_MOUNT, error);
	if (types & ENTRY_SYSLOG && (error = take_log(fds + count_types(types), types & CLONE_NEWNS)))
		refuse(to_fd, STEP_FILTER, error);
	/* The daemon sees for itself what we have joined, and counts us. */
	if (send_fds(channel_fd, "", 1, &listener_fd, listener_fd >= 0) ||
	    receive(channel_fd, &go, sizeof(go), NULL, 0) < (ssize_t)sizeof(go))
		refuse(to_fd, STEP_CGROUP, ENODEV);
	if (go.error)
		refuse(to_fd, STEP_CGROUP, -go.error);
	if (types & CLONE_NEWPID) {
		pid = fork();
		if (pid < 0)
			refuse(to_fd, STEP_CLONE, errno);
		if (pid) {
			syscall(SYS_close_range, 0, ~0U, 0);
			while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
				;
			if (WIFSIGNALED(status)) {
				signal(WTERMSIG(status), SIG_DFL);
				raise(WTERMSIG(status));
			}
			_exit(exit_code(status));
		}
	}
	if (setsid() < 0 && errno != EPERM)
		refuse(to_fd, STEP_TERMINAL, errno);
	if ((error = open_stdio(to_fd)))
		refuse(to_fd, STEP_TERMINAL, error);
	if (syscall(SYS_close_range, 3, ~0U, 4 /* CLOSE_RANGE_CLOEXEC */))
		refuse(to_fd, STEP_STDIO, errno);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	/* Members may look at what is in their user namespace. */
	if (types & CLONE_NEWUSER) {
		for (size_t i = 0; i < N(ENVIRONMENT); i++)
			passed[count++] = (char *)(uintptr_t)ENVIRONMENT[i];
		for (size_t i = 0; i < N(PASSED); i++)
			if (getenv(PASSED[i]) &&
			    asprintf(&passed[count], "%s=%s", PASSED[i], getenv(PASSED[i])) >= 0)
				count++;
		environ = passed;
	}
	if (command) {
		(void)execvp(command[0], command);
	} else {
		(void)execv(own[0], own);
		own[0] = (char *)(uintptr_t)"/bin/sh";
		(void)execv(own[0], own);
	}
	refuse(to_fd, STEP_EXEC, errno);
}

static void start_in_part(int channel_fd, uint32_t types, const int *fds)
{
	int ends[2];

	/* It will share namespaces with the container's members, and with it our memory. */
	(void)prctl(PR_SET_DUMPABLE, 0);
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
		fail(FAILED, "%s", strerror(errno));
	child = fork();
	if (child < 0)
		fail(FAILED, "fork: %s", strerror(errno));
	if (!child) {
		close(ends[0]);
		run_in_part(ends[1], channel_fd, types, fds);
	}
	child_fd = (int)syscall(SYS_pidfd_open, child, 0);
	if (child_fd < 0)
		fail(FAILED, "pidfd_open: %s", strerror(errno));
	close(ends[1]);
	close(channel_fd);
	said_fd = ends[0];
}

/* --- relaying --- */

static void add_stream(int from_fd, int to_fd, bool inward)
{
	struct stream *each = &streams[stream_count++];

	each->from_fd = from_fd;
	each->to_fd = to_fd;
	each->inward = inward;
}

static void non_blocking(int fd)
{
	(void)fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

/* Take the other ends of what is 0, 1 and 2 inside. */
static void take_stdio(void)
{
	const size_t wanted = on_terminal ? (isatty(STDERR_FILENO) ? 1 : 2) : 3;
	struct init_reply reply;
	struct stat st;
	int fds[4];
	ssize_t length;

	length = receive(said_fd, &reply, sizeof(reply), fds, N(fds));
	if (length != sizeof(reply))
		fail(FAILED, "%s", strerror(ENODEV));
	if (reply.op != INIT_OPENED || fds[wanted - 1] < 0)
		fail(FAILED, "%s%s", strerror(reply.error ? -reply.error : EPROTO),
		     reply.step == STEP_TERMINAL ? " (no terminal inside)" : "");
	for (size_t i = 0; i < wanted; i++)
		non_blocking(fds[i]);
	/* Kept where the next daemon looks for it. */
	if (fds[wanted] >= 0) {
		(void)dup3(fds[wanted], ENTRY_LISTENER_FD, O_CLOEXEC);
		close(fds[wanted]);
	}
	if (!on_terminal) {
		add_stream(STDIN_FILENO, fds[0], true);
		/* A pipe of one page polls writable when it is empty. */
		streams[0].in_step = lseek(STDIN_FILENO, 0, SEEK_CUR) >= 0 &&
			fcntl(fds[0], F_SETPIPE_SZ, CHUNK) == CHUNK;
		add_stream(fds[1], STDOUT_FILENO, false);
		add_stream(fds[2], STDERR_FILENO, false);
		return;
	}
	/* /dev is the members': they may have put there what they like. */
	master_fd = fds[0];
	if (fstat(master_fd, &st) || !S_ISCHR(st.st_mode) || major(st.st_rdev) != 5 || minor(st.st_rdev) != 2)
		fail(FAILED, "no terminal inside");
	add_stream(STDIN_FILENO, master_fd, true);
	add_stream(dup(master_fd), STDOUT_FILENO, false);
	if (wanted == 2)
		add_stream(fds[1], STDERR_FILENO, false);
}

static void send_signal(int number, bool group)
{
	const struct init_request request = {
		.op = INIT_SIGNAL, .token = (uint64_t)number, .flags = group ? INIT_GROUP : 0 };

	if (child)
		(void)kill(group ? -child : child, number);
	else
		(void)send(wait_fd, &request, sizeof(request), MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void hear_signal(int signal_fd)
{
	struct signalfd_siginfo info;
	int number;

	if (read(signal_fd, &info, sizeof(info)) != sizeof(info))
		return;
	number = (int)info.ssi_signo;
	switch (number) {
	case SIGWINCH:
		pass_size();
		return;
	case SIGTSTP:
		/* With a terminal inside the key was typed there: this one was sent to us. */
		set_raw(false);
		if (!on_terminal)
			send_signal(SIGSTOP, true);
		(void)kill(getpid(), SIGSTOP);
		return;
	case SIGCONT:
		if (on_terminal && in_foreground())
			take_terminal();
		pass_size();
		if (!on_terminal)
			send_signal(SIGCONT, true);
		return;
	default:
		/* What a terminal sends, it sends to the whole group. */
		send_signal(number, info.ssi_code == SI_KERNEL);
		if (number == SIGHUP && on_terminal)
			leave(128 + SIGHUP);
	}
}

/* How much was read of standard input that the command has not taken. */
static off_t unread;

/* Close both ends; what is a descriptor of ours by number 0, 1, 2 stays. */
static void end_stream(struct stream *each)
{
	int in_pipe = 0;

	if (each->in_step && !ioctl(each->to_fd, FIONREAD, &in_pipe))
		unread += (off_t)(each->end - each->start) + in_pipe;
	if (each->from_fd > 2)
		close(each->from_fd);
	if (each->to_fd > 2 && each->to_fd != master_fd)
		close(each->to_fd);
	each->from_fd = each->to_fd = -1;
	each->start = each->end = 0;
}

static void move(struct stream *each)
{
	ssize_t done;

	if (each->start == each->end) {
		done = read(each->from_fd, each->data, each->inward ? CHUNK : sizeof(each->data));
		if (done > 0) {
			each->start = 0;
			each->end = (size_t)done;
		} else if (!done || (errno != EAGAIN && errno != EINTR)) {
			/* The terminal is gone, or its user: then so is the one inside. */
			if (each->inward && on_terminal)
				leave(128 + SIGHUP);
			end_stream(each);
		}
		return;
	}
	done = (ssize_t)(each->end - each->start);
	done = write(each->to_fd, each->data + each->start, done > CHUNK ? CHUNK : (size_t)done);
	if (done > 0)
		each->start += (size_t)done;
	else if (done < 0 && errno != EAGAIN && errno != EINTR)
		/* Nobody reads it: so who writes it shall get SIGPIPE. */
		end_stream(each);
}

/* Whether it has ended; the exit code is then in *code. */
static bool ended(int *code)
{
	struct init_reply reply = { .op = 0 };
	int status;

	if (child) {
		if (waitpid(child, &status, WNOHANG) != child)
			return false;
		*code = exit_code(status);
	} else {
		const ssize_t length = recv(wait_fd, &reply, sizeof(reply), MSG_DONTWAIT);

		if (length < 0 && (errno == EAGAIN || errno == EINTR))
			return false;
		/* The init itself is gone: the container was killed, and all that was in it. */
		if (length != sizeof(reply))
			*code = 128 + SIGKILL;
		else
			*code = reply.op == INIT_EXITED ? exit_code(reply.status) : FAILED;
	}
	return true;
}

/* How a command that has not even started ended. */
static void tell_failure(int *code)
{
	struct init_reply reply;

	if (recv(said_fd, &reply, sizeof(reply), MSG_DONTWAIT) != sizeof(reply) || reply.op != INIT_FAILED)
		return;
	set_raw(false);
	if (reply.step != STEP_EXEC)
		*code = FAILED;
	else
		*code = reply.error == -ENOENT ? NOT_FOUND : NOT_EXECUTABLE;
	dprintf(STDERR_FILENO, "nsfs: %s: %s: %s\n", name,
		reply.step == STEP_EXEC ? (command ? command[0] : "/bin/sh") : "starting the command",
		strerror(-reply.error));
}

/* Give back what was read of a file but not by the command, so that the next command of a script finds it. */
static void give_back(void)
{
	if (streams[0].in_step && streams[0].from_fd >= 0)
		end_stream(&streams[0]);
	if (unread)
		(void)lseek(STDIN_FILENO, -unread, SEEK_CUR);
}

/* Until the command has ended and what it printed is out; returns its exit code. */
static int relay(int signal_fd)
{
	struct pollfd polled[2 + N(streams)];
	bool is_over = false, background = false;
	int code = 0, most_ms;

	for (;;) {
		bool open = false, full = false;
		int ready;

		polled[0] = (struct pollfd){ .fd = background ? -1 : signal_fd, .events = POLLIN };
		polled[1] = (struct pollfd){
			.fd = is_over ? -1 : child ? child_fd : wait_fd, .events = POLLIN };
		for (size_t i = 0; i < stream_count; i++) {
			struct stream *each = &streams[i];

			polled[2 + i] = (struct pollfd){ .fd = -1 };
			if (each->from_fd < 0 || (each->inward && is_over))
				continue;
			open |= !each->inward;
			full |= each->start != each->end && !each->inward;
			if (each->start != each->end || each->in_step)
				polled[2 + i] = (struct pollfd){ .fd = each->to_fd, .events = POLLOUT };
			else if (!each->inward || !on_terminal || is_raw)
				polled[2 + i] = (struct pollfd){ .fd = each->from_fd, .events = POLLIN };
		}
		if (is_over && !open)
			return code;
		if (!is_over)
			most_ms = on_terminal && !is_raw ? LOOK_MS : -1;
		else
			most_ms = background || full ? -1 : on_terminal ? LAST_WORDS_MS : 0;
		ready = poll(polled, 2 + stream_count, most_ms);
		if (ready < 0)
			continue;
		if (!ready && !is_over) {
			/* A shell that brings a job to the foreground which was not stopped (`ln ... &`, `fg`) tells
			 * nobody. */
			if (in_foreground()) {
				take_terminal();
				pass_size();
			}
			continue;
		}
		if (!ready && is_over) {
			pid_t pid;

			if (on_terminal)
				return code;
			/* Somebody inside still has our pipes: as it would be without us, the command has ended and
			 * what they print goes where it shall go. */
			pid = fork();
			if (pid)
				return code;
			background = true;
			guardian = 0;
			close(STDIN_FILENO);
			prctl(PR_SET_NAME, "nsfs-relay");
			continue;
		}
		for (size_t i = 0; i < stream_count; i++)
			if (polled[2 + i].revents && streams[i].from_fd >= 0)
				move(&streams[i]);
		if (polled[0].revents)
			hear_signal(signal_fd);
		if (polled[1].revents && ended(&code)) {
			is_over = true;
			tell_failure(&code);
			give_back();
		}
	}
}

/* --- asking --- */

static int make_channel(const char *path, const char *only)
{
	char target[4200], wanted[128];
	int ends[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
		fail(FAILED, "socketpair: %s", strerror(errno));
	if (snprintf(target, sizeof(target), "%s/procs", path) >= (int)sizeof(target))
		fail(FAILED, "%s", strerror(ENAMETOOLONG));
	snprintf(wanted, sizeof(wanted), "%d%s%.100s", ends[1], only ? ":" : "", only ? only : "");
	if (setxattr(target, ENTER_ATTRIBUTE, wanted, strlen(wanted), 0))
		fail(FAILED, "%s", errno == ENOENT || errno == ENOTDIR ? "no such container" : strerror(errno));
	close(ends[1]);
	return ends[0];
}

static void begin(int channel_fd)
{
	static char told[256];
	struct { struct entry_offer offer; char name[200]; } answer = { .offer = { .error = 0 } };
	size_t expected;
	int fds[OFFER_FDS_MAX];
	const ssize_t length = receive(channel_fd, &answer, sizeof(answer) - 1, fds, N(fds));

	if (length < (ssize_t)sizeof(answer.offer))
		fail(FAILED, "%s", strerror(ENODEV));
	if (!*name) {
		snprintf(told, sizeof(told), "%.*s", (int)sizeof(answer.name), answer.name);
		name = told;
	}
	if (answer.offer.error)
		fail(FAILED, "%s", strerror(-answer.offer.error));
	expected = answer.offer.types ? count_types(answer.offer.types) : 3;
	if (answer.offer.types & ENTRY_SYSLOG)
		expected += 2;
	if (fds[expected - 1] < 0)
		fail(FAILED, "%s", strerror(EMFILE));
	if (answer.offer.types) {
		start_in_part(channel_fd, answer.offer.types, fds);
	} else {
		close(channel_fd);
		start_whole(&answer.offer, fds);
	}
	take_stdio();
}

static int start_signals(void)
{
	sigset_t set;
	int fd;

	sigemptyset(&set);
	for (size_t i = 0; i < N(FORWARDED); i++)
		sigaddset(&set, FORWARDED[i]);
	sigprocmask(SIG_BLOCK, &set, NULL);
	fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (fd < 0)
		fail(FAILED, "signalfd: %s", strerror(errno));
	signal(SIGPIPE, SIG_IGN);
	return fd;
}

__attribute__((noreturn))
static void usage(void)
{
	dprintf(STDERR_FILENO, "usage: nsfs enter [--only LIST] [--ssh] CONTAINER [-- COMMAND...]\n");
	_exit(FAILED);
}

/* The command that a login daemon or a shell gives as one string. */
static void use_shell(const char *text)
{
	static char *words[4];

	words[0] = (char *)(uintptr_t)"/bin/sh";
	words[1] = (char *)(uintptr_t)(text ? "-c" : "-l");
	words[2] = (char *)(uintptr_t)text;
	command = words;
}

int main(int argc, char **argv)
{
	const char *container = NULL, *only = NULL, *channel = NULL;
	bool plain = argc == 0 || *argv[0] == '-', ssh = false;
	char path[4096];
	int channel_fd, signal_fd, i;

	own_words = argv;
	(void)prctl(PR_SET_NAME, "nsfs-enter");
	/* Closed ones would be taken by what we open. */
	for (i = 0; i < 3; i++)
		if (fcntl(i, F_GETFD) < 0)
			(void)open("/dev/null", i ? O_WRONLY : O_RDONLY);
	if (argc == 3 && !strcmp(argv[1], "-c")) {
		plain = true;
		use_shell(argv[2]);
	} else if (plain) {
		use_shell(NULL);
	}
	for (i = 1; !plain && i < argc; i++) {
		if (!strcmp(argv[i], "--")) {
			command = i + 1 < argc ? argv + i + 1 : NULL;
			break;
		}
		if (!strcmp(argv[i], "--only") && i + 1 < argc)
			only = argv[++i];
		else if (!strcmp(argv[i], "--channel") && i + 1 < argc)
			channel = argv[++i];
		else if (!strcmp(argv[i], "--ssh"))
			ssh = true;
		else if (*argv[i] == '-' || container)
			usage();
		else
			container = argv[i];
	}
	if (plain)
		container = getenv("LOGNAME") ? getenv("LOGNAME") : getenv("USER");
	if (!container || !*container || (plain && (strchr(container, '/') || *container == '.')))
		usage();
	if (ssh && getenv("SSH_ORIGINAL_COMMAND"))
		use_shell(getenv("SSH_ORIGINAL_COMMAND"));
	name = container;
	on_terminal = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO) && !tcgetattr(STDIN_FILENO, &outer_mode);
	if (channel) {
		/* The program itself is still open, and whatever the ln inherited. */
		channel_fd = atoi(channel);
		if (channel_fd < 3 || (channel_fd != 3 && dup2(channel_fd, 3) < 0))
			usage();
		channel_fd = 3;
		(void)fcntl(channel_fd, F_SETFD, FD_CLOEXEC);
		syscall(SYS_close_range, 4, ~0U, 0);
	} else {
		const bool is_path = *container == '/' || !strncmp(container, "./", 2) ||
			!strncmp(container, "../", 3);

		if (snprintf(path, sizeof(path), "%s%s", is_path ? "" : TREE, container) >= (int)sizeof(path))
			fail(FAILED, "%s", strerror(ENAMETOOLONG));
		channel_fd = make_channel(path, only);
	}
	begin(channel_fd);
	signal_fd = start_signals();
	if (on_terminal && in_foreground())
		take_terminal();
	leave(relay(signal_fd));
}
