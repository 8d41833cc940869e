/*
 * trace - what nsfs-tracer does to processes, without the rest of nsfs: for machines on which that is all there is.
 *
 *   trace PATH-OF-NSFS-TRACER        as root; exit status 0 when all was well
 *
 * As PID 1 it mounts /proc first and switches the machine off at the end.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../../nsfs/csrc/protocol.h"

#define WAIT_MS 5000	/* how long the processes traced wait for whatever they wait for */
#define TYPES (CLONE_NEWNET | CLONE_NEWUTS)

static int tracer_fd, failures;
static pid_t holder;

static void check(bool good, const char *name, const char *what)
{
	if (!good) {
		printf("FAILED %s: %s (%s)\n", name, what, strerror(errno));
		failures++;
	}
}

static long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* --- the processes traced; each returns 0 when it found everything as it should be --- */

static int pipe_fds[2];
static volatile sig_atomic_t ticks;

static void tick(int number)
{
	(void)number;
	ticks++;
}

static int sleeps(void)
{
	const struct timespec wanted = { WAIT_MS / 1000, WAIT_MS % 1000 * 1000000L };
	struct timespec left;

	return nanosleep(&wanted, &left);
}

static int sleeps_until(void)
{
	struct timespec end;

	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += WAIT_MS / 1000;
	return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &end, NULL);
}

static int polls(void)
{
	return poll(NULL, 0, WAIT_MS);
}

static int later(int status)
{
	const pid_t pid = fork();

	if (!pid) {
		sleeps();
		(void)!write(pipe_fds[1], "data", 4);
		_exit(status);
	}
	return pid;
}

static int reads(void)
{
	char data[8];

	later(0);
	return read(pipe_fds[0], data, sizeof(data)) == 4 && !memcmp(data, "data", 4) ? 0 : -1;
}

static int waits(void)
{
	const pid_t pid = later(7);
	int status;

	return waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 7 ? 0 : -1;
}

static int computes(void)
{
	const long end = now_ms() + WAIT_MS;
	volatile uint64_t a = 0, b = 1;
	uint64_t x = 0, y = 1, count = 0, next;
	volatile double sum = 0;

	while (now_ms() < end)
		for (int i = 0; i < 1000; i++, count++) {
			next = (a + b) % 1000003;
			a = b;
			b = next;
			sum += 0.5;
		}
	for (uint64_t i = 0; i < count; i++) {
		next = (x + y) % 1000003;
		x = y;
		y = next;
	}
	return a == x && b == y && sum == (double)count / 2 ? 0 : -1;
}

static int ticks_on(void)
{
	const struct itimerval every = { { 0, 100000 }, { 0, 100000 } };

	signal(SIGALRM, tick);
	setitimer(ITIMER_REAL, &every, NULL);
	while (ticks < WAIT_MS / 100)
		pause();
	return 0;
}

static const struct { const char *name; int (*run)(void); } TARGETS[] = {
	{ "sleeping", sleeps }, { "sleeping until", sleeps_until }, { "polling", polls },
	{ "reading", reads }, { "waiting", waits }, { "computing", computes }, { "ticking", ticks_on } };

#define N_TARGETS (sizeof(TARGETS) / sizeof(TARGETS[0]))

/* --- requests --- */

static struct trace_reply ask(const struct trace_request *request, const char *name, const int *fds, size_t count)
{
	struct { struct trace_request head; char name[16]; } message = { .head = *request };
	union {
		char buffer[CMSG_SPACE(sizeof(int) * 3)];
		struct cmsghdr align;
	} control = { .buffer = "" };
	struct iovec iov = { &message, sizeof(message.head) + strlen(name) };
	struct msghdr header = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buffer };
	struct trace_reply reply = { .error = -EIO };
	int ends[2], sent[3];
	ssize_t length;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
		return reply;
	memcpy(message.name, name, strlen(name));
	if (count)
		memcpy(sent, fds, count * sizeof(int));
	sent[count++] = ends[1];
	header.msg_controllen = CMSG_SPACE(sizeof(int) * count);
	control.align.cmsg_level = SOL_SOCKET;
	control.align.cmsg_type = SCM_RIGHTS;
	control.align.cmsg_len = CMSG_LEN(sizeof(int) * count);
	memcpy(CMSG_DATA(&control.align), sent, count * sizeof(int));
	if (sendmsg(tracer_fd, &header, 0) < 0)
		return reply;
	close(ends[1]);
	do
		length = recv(ends[0], &reply, sizeof(reply), 0);
	while (length == 1);
	close(ends[0]);
	if (length != sizeof(reply))
		reply.error = -EIO;
	return reply;
}

static bool is_same(pid_t one, pid_t other, const char *type)
{
	struct stat first, second;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/ns/%s", (int)one, type);
	if (stat(path, &first))
		return false;
	snprintf(path, sizeof(path), "/proc/%d/ns/%s", (int)other, type);
	return !stat(path, &second) && first.st_ino == second.st_ino;
}

static pid_t start(int (*run)(void))
{
	const long start = now_ms();
	char host[65] = "";
	sigset_t mask;
	int result;
	pid_t pid;

	if (pipe(pipe_fds))
		exit(1);
	fflush(stdout);
	pid = fork();
	if (pid) {
		close(pipe_fds[0]);
		close(pipe_fds[1]);
		return pid;
	}
	result = run();
	sigprocmask(SIG_SETMASK, NULL, &mask);
	for (int i = 1; i < 32; i++)
		if (sigismember(&mask, i))
			result = -2;
	if (gethostname(host, sizeof(host)) || strcmp(host, "web"))
		result = -3;
	if (now_ms() - start < WAIT_MS - 10)
		result = -4;
	_exit(-result);
}

/* All at once: they wait, and so do we but once. */
static void test_moves(void)
{
	struct trace_request request = { .op = TRACE_MOVE, .caller = getpid(), .init = holder, .types = TYPES };
	struct trace_reply replies[N_TARGETS];
	pid_t pids[N_TARGETS];
	int status;

	for (size_t i = 0; i < N_TARGETS; i++)
		pids[i] = start(TARGETS[i].run);
	usleep(300000);
	for (size_t i = 0; i < N_TARGETS; i++) {
		request.target = pids[i];
		replies[i] = ask(&request, "", NULL, 0);
		errno = -replies[i].error;
		check(!replies[i].error, TARGETS[i].name, "moved");
		check(is_same(pids[i], holder, "net") && is_same(pids[i], holder, "uts") &&
		      !is_same(pids[i], getpid(), "net"), TARGETS[i].name, "it has the namespaces");
	}
	for (size_t i = 0; i < N_TARGETS; i++) {
		check(waitpid(pids[i], &status, 0) == pids[i] && WIFEXITED(status), TARGETS[i].name, "it has ended");
		printf("%s: exit status %d, stopped for %u us\n", TARGETS[i].name, WEXITSTATUS(status),
		       replies[i].stopped_us);
		check(!WEXITSTATUS(status), TARGETS[i].name, "it went on unharmed");
	}
}

/* Not half done. */
static void test_refused(void)
{
	struct trace_request request = { .op = TRACE_MOVE, .caller = getpid(), .init = 0x3fffff, .types = TYPES };
	const pid_t pid = fork();
	int status;

	if (!pid) {
		pause();
		_exit(0);
	}
	request.target = pid;
	check(ask(&request, "", NULL, 0).error, "refused", "no such init");
	check(is_same(pid, getpid(), "net"), "refused", "as it was");
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);
}

static void test_session(const char *program)
{
	struct trace_request request = { .op = TRACE_SESSION };
	const int program_fd = open(program, O_RDONLY | O_CLOEXEC);
	struct trace_reply reply;
	int ends[2], status;
	pid_t pid;

	if (program_fd < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
		exit(1);
	setenv("KEPT", "as it was", 1);
	fflush(stdout);
	pid = fork();
	if (!pid) {
		/* execve: so that the environment is where the kernel puts it. */
		execl("/proc/self/exe", "trace", "--pause", NULL);
		_exit(1);
	}
	usleep(300000);
	request.target = pid;
	reply = ask(&request, "web", (const int[]){ program_fd, ends[1] }, 2);
	errno = -reply.error;
	check(!reply.error, "session", "made");
	check(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 33, "session",
	      "its exit status");
	printf("session: exit status %d, stopped for %u us\n", WEXITSTATUS(status), reply.stopped_us);
	close(program_fd);
	close(ends[0]);
	close(ends[1]);
}

/* In place of nsfs-enter. */
static int be_session(int argc, char **argv)
{
	struct stat st;
	sigset_t mask;

	sigprocmask(SIG_SETMASK, NULL, &mask);
	return argc == 4 && !strcmp(argv[3], "web") && !fstat(atoi(argv[2]), &st) && S_ISSOCK(st.st_mode) &&
	       getenv("KEPT") && !strcmp(getenv("KEPT"), "as it was") && !sigismember(&mask, SIGTERM) ? 33 : 34;
}

static void start_tracer(const char *path)
{
	int ends[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
		exit(1);
	if (!fork()) {
		if (ends[1] == SPAWNER_SOCKET_FD)
			fcntl(SPAWNER_SOCKET_FD, F_SETFD, 0);
		else
			dup2(ends[1], SPAWNER_SOCKET_FD);
		execl(path, "nsfs-tracer", NULL);
		_exit(1);
	}
	close(ends[1]);
	tracer_fd = ends[0];
}

int main(int argc, char **argv)
{
	const bool alone = getpid() == 1;

	if (argc == 2 && !strcmp(argv[1], "--pause")) {
		pause();
		return 1;
	}
	if (argc > 2 && !strcmp(argv[1], "--channel"))
		return be_session(argc, argv);
	if (alone) {
		mkdir("/proc", 0755);
		mkdir("/dev", 0755);
		if (mount("none", "/proc", "proc", 0, NULL) || mount("none", "/dev", "devtmpfs", 0, NULL))
			perror("mount");
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	start_tracer(alone ? "/nsfs-tracer" : argc > 1 ? argv[1] : "nsfs-tracer");
	holder = fork();
	if (!holder) {
		if (unshare(TYPES) || sethostname("web", 3))
			_exit(1);
		for (;;)
			pause();
	}
	usleep(300000);
	test_moves();
	test_refused();
	test_session(alone ? "/init" : "/proc/self/exe");
	kill(holder, SIGKILL);
	printf("%d failures\n", failures);
	if (alone) {
		sync();
		reboot(RB_POWER_OFF);
	}
	return failures ? 1 : 0;
}
