/*
 * clone3 - the limit for making a container: one clone3(2) with a namespace of every type, and nothing
 * else: no mount, no map, no exec.
 *
 * Reads commands, one letter each, from standard input and answers each with a line: nanoseconds, or
 * -errno.  So each is one of a series that is interleaved with others', and no exec is in its time.
 *
 *	x	clone; the child exits; until wait(2) has told of it
 *	r	clone; the child says through a pipe that it runs, and pauses; until it has said so
 *	h	the same, and the child is kept
 *	k	kill all that are kept and wait for them
 *
 * It ends with its input, and what it kept dies with it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define KEPT_MAX 4096
#define ALL_NAMESPACES (CLONE_NEWCGROUP | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWPID | \
			CLONE_NEWTIME | CLONE_NEWUSER | CLONE_NEWUTS)

static pid_t kept[KEPT_MAX];
static unsigned kept_count;

static int64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* The child's PID, or -errno; with a ready_fd the child writes a byte to it and stays. */
static pid_t make(int ready_fd)
{
	struct clone_args args = { .flags = ALL_NAMESPACES, .exit_signal = SIGCHLD };
	long pid = syscall(SYS_clone3, &args, sizeof(args));

	if (pid < 0)
		return -errno;
	if (pid)
		return (pid_t)pid;
	if (ready_fd < 0)
		_exit(0);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (write(ready_fd, "", 1) != 1)
		_exit(1);
	for (;;)
		pause();
}

static int64_t make_and_exit(void)
{
	int64_t start = now_ns();
	pid_t pid = make(-1);

	if (pid < 0)
		return pid;
	if (waitpid(pid, NULL, 0) < 0)
		return -errno;
	return now_ns() - start;
}

static int64_t make_ready(int ready[2], pid_t *pid)
{
	int64_t start = now_ns();
	char byte;

	*pid = make(ready[1]);
	if (*pid < 0)
		return *pid;
	if (read(ready[0], &byte, 1) != 1)
		return -errno;
	return now_ns() - start;
}

static int64_t kill_kept(void)
{
	int64_t start = now_ns();

	for (unsigned i = 0; i < kept_count; i++)
		kill(kept[i], SIGKILL);
	for (; kept_count; kept_count--)
		if (waitpid(kept[kept_count - 1], NULL, 0) < 0)
			return -errno;
	return now_ns() - start;
}

static int64_t obey(int command, int ready[2])
{
	int64_t result;
	pid_t pid;

	switch (command) {
	case 'x':
		return make_and_exit();
	case 'r':
		result = make_ready(ready, &pid);
		if (pid > 0) {
			kill(pid, SIGKILL);
			waitpid(pid, NULL, 0);
		}
		return result;
	case 'h':
		if (kept_count == KEPT_MAX)
			return -ENOSPC;
		result = make_ready(ready, &pid);
		if (pid > 0)
			kept[kept_count++] = pid;
		return result;
	case 'k':
		return kill_kept();
	default:
		return -EINVAL;
	}
}

int main(void)
{
	int ready[2], command;

	if (pipe(ready) < 0)
		return 1;
	while ((command = getchar()) != EOF) {
		printf("%lld\n", (long long)obey(command, ready));
		fflush(stdout);
	}
	return 0;
}
