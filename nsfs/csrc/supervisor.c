/*
 * nsfs-supervisor - mounts the filesystem, keeps what must not be lost, keeps a daemon running.
 *
 *   nsfs-supervisor --dir DIR --run-dir RUN [--cgroup PATH] [--unmount PATH]... [--foreground]
 *                   [--adopt PID] -- DAEMON ARGUMENT...
 *
 * It holds the FUSE device and the memfd of requests in flight (inflight.h), so the daemon may be
 * killed at any time: requests wait, and the next daemon answers them.  So plain that it never fails:
 * after start-up there is no allocation, no library beyond libc, no handler of signals, and no file of
 * the mount is ever opened or asked about (that would wait for a daemon which only we can start).
 *
 * The daemon gets NSFS_FUSE_FD, NSFS_INFLIGHT_FD, NSFS_SUPERVISOR_FD (a pipe: whatever is written to
 * it means "ready") and LD_PRELOAD.  It is started again whenever it dies, unless
 *   - it exits with status 0, or was asked to stop: unmount; status 0, or 1 if it failed in that;
 *   - it was the first and never became ready: unmount; its status, 128+n for a signal.
 * SIGTERM or SIGINT asks it to stop by SIGTERM; a second one, or 60 s, by SIGKILL (status 1).
 * Should the supervisor itself be killed the daemon goes on serving.  With --adopt PID another one takes the
 * device and the memfd from that daemon, kills it, and goes on: nothing is mounted, and no request is lost.
 *
 * Without --foreground the parent returns when the daemon is ready, or with the status above.
 * With it, READY=1 and STOPPING=1 go to $NOTIFY_SOCKET (sd_notify(3)).  RUN/supervisor.pid and
 * RUN/daemon.pid hold the PIDs, RUN/log what both print (RUN/log.old: before 1 MiB of it).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "inflight.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U		/* Linux 6.3 */
#endif
#define MAX_UNMOUNTS 16
#define EARLY_MS 1000			/* who dies within that of being ready was not well */
#define BACK_OFF_CAP_MS 1000
#define STOP_MS 60000			/* from SIGTERM to SIGKILL */
#define KILL_MS 5000			/* from SIGKILL to going without it */
#define LOG_BYTES (1024 * 1024)
#define NEVER INT64_MAX

static const char *dir, *run_dir, *cgroup, *unmounts[MAX_UNMOUNTS];
static int unmount_count;
static bool foreground, mounted, ever_ready, told_ready;
static char **daemon_argv, interposer[4096];
static pid_t adopted_pid;		/* 0: we mount */
static int run_fd = -1, fuse_fd = -1, inflight_fd = -1, signal_fd = -1;
static int status_fd = -1;		/* to the parent, until it was told; without --foreground */
static int ready_fd = -1;		/* from the daemon, until it is ready */
static sigset_t old_mask;
static pid_t daemon_pid;		/* 0: none runs */
static int64_t started_ms, ready_ms = NEVER, start_at_ms, stop_at_ms = NEVER;
static enum { RUNNING, ASKED, KILLED } stopping;
static uint32_t generation, crashes, early_deaths;

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

__attribute__((format(printf, 1, 2)))
static void say(const char *format, ...)
{
	char text[512], when[32] = "";
	time_t seconds = time(NULL);
	struct tm tm;
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	if (gmtime_r(&seconds, &tm))
		strftime(when, sizeof(when), "%Y-%m-%dT%H:%M:%SZ", &tm);
	dprintf(STDERR_FILENO, "%s nsfs-supervisor: %s\n", when, text);
}

static void notify(const char *state)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	const char *path = foreground ? getenv("NOTIFY_SOCKET") : NULL;
	size_t length = path ? strlen(path) : 0;
	int fd;

	if (!length || length >= sizeof(address.sun_path))
		return;
	memcpy(address.sun_path, path, length);
	if (path[0] == '@')
		address.sun_path[0] = '\0';
	length += offsetof(struct sockaddr_un, sun_path);
	fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || sendto(fd, state, strlen(state), MSG_NOSIGNAL,
			     (struct sockaddr *)&address, (socklen_t)length) < 0)
		say("notify %s: %s", state, strerror(errno));
	if (fd >= 0)
		close(fd);
}

static void tell_parent(int status)
{
	if (status_fd >= 0 && write(status_fd, &status, sizeof(status)) < 0)
		say("tell the parent: %s", strerror(errno));
	if (status_fd >= 0)
		close(status_fd);
	status_fd = -1;
}

/* The end, of start-up as well. */
__attribute__((noreturn))
static void finish(int status)
{
	notify("STOPPING=1");
	for (int i = 0; mounted && i <= unmount_count; i++) {
		const char *path = i < unmount_count ? unmounts[i] : dir;

		/* EINVAL, ENOENT: somebody did it already. */
		if (umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW) < 0 && errno != EINVAL && errno != ENOENT)
			say("umount %s: %s", path, strerror(errno));
	}
	if (mounted) {
		unlinkat(run_fd, "supervisor.pid", 0);
		unlinkat(run_fd, "daemon.pid", 0);
	}
	tell_parent(status ? status : 1);	/* stopped before it was ready: it is not */
	exit(status);
}

__attribute__((noreturn))
static void die(const char *what, const char *about)
{
	say("%s %s: %s", what, about, strerror(errno));
	finish(1);
}

static void open_log(void)
{
	int fd = openat(run_fd, "log", O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);

	if (fd < 0 || dup2(fd, STDOUT_FILENO) < 0 || dup2(fd, STDERR_FILENO) < 0)
		say("open log: %s", strerror(errno));
	if (fd >= 0)
		close(fd);
}

static void write_pid(const char *name, const char *temporary, pid_t pid)
{
	int fd = openat(run_fd, temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

	if (fd < 0 || dprintf(fd, "%d\n", (int)pid) < 0 || renameat(run_fd, temporary, run_fd, name) < 0)
		say("write %s: %s", name, strerror(errno));
	if (fd >= 0)
		close(fd);
}

static void hand_down(const char *name, int fd)
{
	char number[16];

	snprintf(number, sizeof(number), "%d", fd);
	if (setenv(name, number, 1) < 0 || fcntl(fd, F_SETFD, 0) < 0)
		_exit(127);
}

__attribute__((noreturn))
static void execute_daemon(int pipe_fd)
{
	hand_down("NSFS_FUSE_FD", fuse_fd);
	hand_down("NSFS_INFLIGHT_FD", inflight_fd);
	hand_down("NSFS_SUPERVISOR_FD", pipe_fd);
	if (setenv("LD_PRELOAD", interposer, 1) < 0)
		_exit(127);
	unsetenv("NOTIFY_SOCKET");
	setsid();			/* ^C is for the supervisor, which asks it to stop */
	sigprocmask(SIG_SETMASK, &old_mask, NULL);
	execvp(daemon_argv[0], daemon_argv);
	say("execute %s: %s", daemon_argv[0], strerror(errno));
	_exit(127);
}

static void start_daemon(void)
{
	uint32_t marks[3] = { INFLIGHT_MAGIC, generation + 1, crashes };
	int pipe_fds[2] = { -1, -1 };
	struct stat st;
	pid_t pid = -1;

	if (!foreground && fstat(STDERR_FILENO, &st) == 0 && st.st_size > LOG_BYTES &&
	    renameat(run_fd, "log", run_fd, "log.old") == 0)
		open_log();
	if (pwrite(inflight_fd, marks, sizeof(marks), 0) == sizeof(marks) &&
	    pipe2(pipe_fds, O_CLOEXEC | O_NONBLOCK) == 0)
		pid = fork();
	if (pid == 0)
		execute_daemon(pipe_fds[1]);
	if (pid < 0)
		say("cannot start the daemon: %s", strerror(errno));
	if (pipe_fds[1] >= 0)
		close(pipe_fds[1]);
	if (pid < 0 && pipe_fds[0] >= 0)
		close(pipe_fds[0]);
	start_at_ms = now_ms() + BACK_OFF_CAP_MS;
	if (pid < 0)
		return;
	generation++;
	started_ms = now_ms();
	ready_ms = NEVER;
	daemon_pid = pid;
	ready_fd = pipe_fds[0];
	write_pid("daemon.pid", ".daemon.pid", pid);
}

/* When the daemon wrote to the pipe, closed it, or died. */
static void read_ready(void)
{
	char text[64];
	bool ready = ready_fd >= 0 && read(ready_fd, text, sizeof(text)) > 0;

	if (ready_fd >= 0)
		close(ready_fd);
	ready_fd = -1;
	if (!ready)
		return;
	say("daemon %d (number %u) is ready", (int)daemon_pid, generation);
	ready_ms = now_ms();
	if (!told_ready)
		notify("READY=1");
	told_ready = ever_ready = true;
	tell_parent(0);
}

static void daemon_died(int wait_status)
{
	bool by_signal = WIFSIGNALED(wait_status);
	int code = by_signal ? WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
	bool early = ready_ms == NEVER || now_ms() - ready_ms < EARLY_MS;
	int64_t delay_ms = 0;

	say("daemon %d (number %u) died after %lld ms, %s %d", (int)daemon_pid, generation,
	    (long long)(now_ms() - started_ms), by_signal ? "signal" : "status", code);
	daemon_pid = 0;
	if (stopping != RUNNING)
		finish(!by_signal && code == 0 && stopping == ASKED ? 0 : 1);
	if (!ever_ready)
		finish(by_signal ? 128 + code : code ? code : 1);
	if (!by_signal && code == 0)
		finish(0);
	/* At once three times; then 50, 100, 200... ms.  Who is killed did not crash. */
	early_deaths = early ? early_deaths + 1 : 0;
	crashes = early && !(by_signal && code == SIGKILL) ? crashes + 1 : 0;
	if (early_deaths > 3)
		delay_ms = early_deaths > 8 ? BACK_OFF_CAP_MS : 50 << (early_deaths - 4);
	start_at_ms = now_ms() + delay_ms;
	say("the next one starts in %lld ms", (long long)delay_ms);
}

static void stop(void)
{
	if (!daemon_pid || stopping == KILLED)
		finish(1);
	kill(daemon_pid, stopping == RUNNING ? SIGTERM : SIGKILL);
	stop_at_ms = now_ms() + (stopping == RUNNING ? STOP_MS : KILL_MS);
	stopping = stopping == RUNNING ? ASKED : KILLED;
}

static void read_signal(void)
{
	struct signalfd_siginfo info;
	int wait_status;
	pid_t pid;

	if (read(signal_fd, &info, sizeof(info)) != sizeof(info))
		return;
	if (info.ssi_signo != SIGCHLD) {
		say("signal %u from process %u", info.ssi_signo, info.ssi_pid);
		stop();
		return;
	}
	while ((pid = waitpid(-1, &wait_status, WNOHANG)) > 0) {
		if (pid != daemon_pid)
			continue;
		read_ready();		/* its last word, maybe */
		daemon_died(wait_status);
	}
}

__attribute__((noreturn))
static void supervise(void)
{
	for (;;) {
		int64_t left_ms = (daemon_pid ? stop_at_ms : start_at_ms) - now_ms();
		struct pollfd fds[] = {
			{ .fd = signal_fd, .events = POLLIN },
			{ .fd = ready_fd, .events = POLLIN },
			{ .fd = status_fd },	/* POLLERR: the parent is gone */
		};

		if (left_ms <= 0 && !daemon_pid) {
			start_daemon();
			continue;
		}
		if (left_ms <= 0) {
			say("daemon %d does not end", (int)daemon_pid);
			stop();
			continue;
		}
		if (poll(fds, 3, left_ms > STOP_MS ? -1 : (int)left_ms) <= 0)
			continue;
		if (fds[1].revents)
			read_ready();
		if (fds[2].revents && status_fd >= 0) {
			say("the parent is gone");
			close(status_fd);
			status_fd = -1;
			stop();
		}
		if (fds[0].revents)
			read_signal();
	}
}

/* Whether a user namespace that has a mount namespace of its own can still bind all of "/". */
static bool others_can_bind(void)
{
	int status = 0;
	pid_t pid = fork();

	if (pid == 0) {
		if (unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0)
			_exit(0);	/* Nobody can make them here, then. */
		_exit(syscall(SYS_open_tree, AT_FDCWD, "/", OPEN_TREE_CLONE | AT_RECURSIVE) < 0 && errno == EPERM);
	}
	return pid > 0 && waitpid(pid, &status, 0) == pid && status == 0;
}

static void mount_filesystem(void)
{
	char options[128];

	/* Not blocking: a request may vanish between poll and read, when its caller is killed. */
	fuse_fd = open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK);
	if (fuse_fd < 0)
		die("open", "/dev/fuse");
	snprintf(options, sizeof(options),
		 "fd=%d,rootmode=40755,user_id=0,group_id=0,allow_other,default_permissions", fuse_fd);
	if (mount(run_dir, dir, "fuse.namespaces", MS_NOSUID | MS_NODEV | MS_NOEXEC, options) < 0)
		die("mount", dir);
	mounted = true;
	/*
	 * Unbindable, `mount --rbind /sys X` does not carry the tree along into what somebody will `rm -rf`.
	 * But where a copy of the mount namespace in another user namespace keeps that (Linux 6.1 does, 6.18
	 * does not), `mount --rbind /` is refused there, of which bubblewrap makes its containers.  Then the
	 * daemon alone watches over removals by way of a copy.
	 */
	if (mount(NULL, dir, NULL, MS_UNBINDABLE, NULL) < 0)
		die("make unbindable", dir);
	if (!others_can_bind() && mount(NULL, dir, NULL, MS_PRIVATE, NULL) < 0)
		die("make bindable", dir);
}

static void make_memfd(void)
{
	inflight_fd = memfd_create("nsfs-inflight", MFD_CLOEXEC | MFD_NOEXEC_SEAL);
	if (inflight_fd < 0)
		inflight_fd = memfd_create("nsfs-inflight", MFD_CLOEXEC);
	if (inflight_fd < 0 || ftruncate(inflight_fd, (off_t)INFLIGHT_BYTES) < 0)
		die("make", "the memfd of requests in flight");
}

static void join_cgroup(void)
{
	char path[4096];
	int fd;

	snprintf(path, sizeof(path), "%s/cgroup.procs", cgroup);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, "0", 1) != 1)
		die("join", cgroup);
	close(fd);
}

/* A copy of a descriptor of the adopted daemon that leads there. */
static int take_descriptor(int pid_fd, const char *wanted)
{
	char path[64], link[64];
	ssize_t length;
	int fd;

	for (int number = 0; number < 1024; number++) {
		snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)adopted_pid, number);
		length = readlink(path, link, sizeof(link) - 1);
		if (length < 0)
			continue;
		link[length] = '\0';
		if (strcmp(link, wanted))
			continue;
		fd = (int)syscall(SYS_pidfd_getfd, pid_fd, number, 0);
		if (fd >= 0)
			return fd;
	}
	errno = ESRCH;
	return -1;
}

/* Take the place of a supervisor that was killed.  Until the daemon is dead it serves as before. */
static void adopt(void)
{
	int pid_fd = (int)syscall(SYS_pidfd_open, adopted_pid, 0);
	struct pollfd polled = { .fd = pid_fd, .events = POLLIN };
	uint32_t marks[3];

	if (pid_fd < 0)
		die("adopt", "the daemon");
	fuse_fd = take_descriptor(pid_fd, "/dev/fuse");
	inflight_fd = take_descriptor(pid_fd, "/memfd:nsfs-inflight (deleted)");
	if (fuse_fd < 0 || inflight_fd < 0 ||
	    pread(inflight_fd, marks, sizeof(marks), 0) != sizeof(marks) || marks[0] != INFLIGHT_MAGIC)
		die("adopt", "the daemon's descriptors");
	generation = marks[1];
	mounted = true;
	ever_ready = true;
	/* Two must never read the device. */
	(void)syscall(SYS_pidfd_send_signal, pid_fd, SIGKILL, NULL, 0);
	while (poll(&polled, 1, -1) <= 0)
		;
	close(pid_fd);
}

static void find_interposer(void)
{
	ssize_t length = readlink("/proc/self/exe", interposer, sizeof(interposer) - 32);
	char *slash = length < 0 ? NULL : strrchr(interposer, '/');

	if (slash)
		strcpy(slash, "/nsfs-interposer.so");
	if (!slash || access(interposer, R_OK) < 0)
		die("find beside the supervisor", "nsfs-interposer.so");
	errno = EINVAL;
	if (strpbrk(interposer, " :"))		/* what separates names in LD_PRELOAD: ld.so(8) */
		die("preload", interposer);
}

static void go_to_background(void)
{
	int pipe_fds[2], status;
	pid_t pid;

	if (pipe2(pipe_fds, O_CLOEXEC) < 0 || (pid = fork()) < 0)
		die("go to", "the background");
	if (pid == 0) {
		close(pipe_fds[0]);
		status_fd = pipe_fds[1];
		setsid();
		return;
	}
	close(pipe_fds[1]);
	if (read(pipe_fds[0], &status, sizeof(status)) != sizeof(status))
		status = 1;
	if (status)
		say("not mounted, status %d; %s/log may tell why", status, run_dir);
	exit(status);
}

static void parse(int argc, char **argv)
{
	static const struct option options[] = {
		{ "dir", required_argument, NULL, 'd' }, { "run-dir", required_argument, NULL, 'r' },
		{ "cgroup", required_argument, NULL, 'c' }, { "unmount", required_argument, NULL, 'u' },
		{ "foreground", no_argument, NULL, 'f' }, { "adopt", required_argument, NULL, 'a' }, { 0 },
	};
	bool wrong = false;
	int option;

	while ((option = getopt_long(argc, argv, "+", options, NULL)) != -1) {
		switch (option) {
		case 'd': dir = optarg; break;
		case 'r': run_dir = optarg; break;
		case 'c': cgroup = optarg; break;
		case 'f': foreground = true; break;
		case 'a':
			adopted_pid = atoi(optarg);
			wrong = wrong || adopted_pid <= 0;
			break;
		case 'u':
			if (unmount_count == MAX_UNMOUNTS || optarg[0] != '/')
				wrong = true;
			else
				unmounts[unmount_count++] = optarg;
			break;
		default: wrong = true;
		}
	}
	daemon_argv = argv + optind;
	/* Absolute: the working directory changes. */
	if (wrong || !dir || dir[0] != '/' || !run_dir || run_dir[0] != '/' || !*daemon_argv) {
		dprintf(STDERR_FILENO, "usage: nsfs-supervisor --dir DIR --run-dir RUN [--cgroup PATH] "
			"[--unmount PATH]... [--foreground] [--adopt PID] -- DAEMON ARGUMENT...\n");
		exit(2);
	}
}

int main(int argc, char **argv)
{
	sigset_t mask;
	int null_fd;

	parse(argc, argv);
	/* Nothing inherited: it might be a file of the mount; and 0 to 2 are open. */
	close_range(3, ~0U, 0);
	do
		null_fd = open("/dev/null", O_RDWR);
	while (null_fd >= 0 && null_fd < 3);
	find_interposer();
	if ((mkdir(run_dir, 0700) < 0 && errno != EEXIST) ||
	    (run_fd = open(run_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0)
		die("open", run_dir);
	if (flock(run_fd, LOCK_EX | LOCK_NB) < 0)
		die("another supervisor runs: lock", run_dir);
	if (!foreground)
		go_to_background();
	/* All of them, so that none has a meaning that is not written here (SIGHUP, SIGPIPE, SIGTSTP). */
	sigfillset(&mask);
	sigprocmask(SIG_SETMASK, &mask, &old_mask);
	sigemptyset(&mask);
	sigaddset(&mask, SIGCHLD);
	sigaddset(&mask, SIGTERM);
	sigaddset(&mask, SIGINT);
	signal_fd = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signal_fd < 0 || chdir("/") < 0)
		die("make", "a signalfd");
	if (cgroup)
		join_cgroup();
	if (adopted_pid) {
		adopt();
	} else {
		make_memfd();
		mount_filesystem();
	}
	dup2(null_fd, STDIN_FILENO);
	close(null_fd);
	if (!foreground)
		open_log();
	write_pid("supervisor.pid", ".supervisor.pid", getpid());
	supervise();
}
