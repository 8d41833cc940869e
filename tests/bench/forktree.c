/*
 * forktree - many processes in one cgroup, to be killed: what rm -rf and cgroup.kill are measured on.
 *
 *	forktree plain CGROUP COUNT still|bomb [TASKS...]	in the host's namespaces
 *	forktree bare CGROUP COUNT still|bomb [TASKS...]	in namespaces of their own, with an init
 *	forktree PID CGROUP COUNT still|bomb [TASKS...]		in those of that process
 *
 * CGROUP is a directory of the cgroup2 hierarchy, TASKS are files `tasks` of version 1 groups.  The
 * first process is born in the former, joins the latter, enters the namespaces and forks the others
 * there.  "still": they pause.  "bomb": each forks on and on, up to
 * COUNT at a time; at that number half of them exit, so that there is always one being forked.  The
 * word "ready" is printed when there are COUNT.  The PID of the first one of "plain" and
 * "bare", for the latter the init, is printed as well.
 *
 * All of them have the standard output open, and nothing else has: its end-of-file is the end of the
 * last of them.  Of "plain" and "bare" they are reaped below this program, which ends after them: the host's init
 * would take longer for thousands, and there are only so many PIDs.  Nothing outlives LIFE_S, whatever becomes of whoever was to kill it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define LIFE_S 60
#define BOMB_LIFE_S 20
#define COUNT_MAX 8000
#define ALL_NAMESPACES (CLONE_NEWCGROUP | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWPID | \
			CLONE_NEWTIME | CLONE_NEWUSER | CLONE_NEWUTS)

struct shared {
	atomic_int live;
	atomic_bool told;
	time_t end_s;
};

static void fail(const char *what)
{
	fprintf(stderr, "forktree: %s: %s\n", what, strerror(errno));
	_exit(1);
}

static time_t now_s(void)
{
	struct timespec time;

	/* Namespaces may shift the other clocks. */
	clock_gettime(CLOCK_REALTIME, &time);
	return time.tv_sec;
}

static void tell_ready(void)
{
	if (write(STDOUT_FILENO, "ready\n", 6) != 6)
		_exit(1);
}

static void pause_for_ever(void)
{
	alarm(LIFE_S);
	for (;;)
		pause();
}

static void be_still(int count)
{
	for (int i = 1; i < count; i++) {
		pid_t pid = fork();

		if (pid < 0)
			fail("fork");
		if (!pid)
			pause_for_ever();
	}
	tell_ready();
	pause_for_ever();
}

/* What the others do; the first one stays, so that it never burns out. */
static void be_bomb(struct shared *shared, int count)
{
	bool first = true;
	uint32_t random = 1;

	signal(SIGCHLD, SIG_IGN);
	while (now_s() < shared->end_s) {
		if (atomic_fetch_add(&shared->live, 1) < count) {
			pid_t pid = fork();

			if (!pid) {
				first = false;
				random = (uint32_t)getpid() * 2654435761u;
			}
			if (pid >= 0)
				continue;
			/* The limit of processes was met first: as good as COUNT. */
		}
		atomic_fetch_sub(&shared->live, 1);
		if (!atomic_exchange(&shared->told, true))
			tell_ready();
		random = random * 1664525u + 1013904223u;
		if (!first && random >> 31) {
			atomic_fetch_sub(&shared->live, 1);
			_exit(0);
		}
	}
	_exit(0);
}

static void be_tree(struct shared *shared, int count, bool bomb)
{
	if (bomb)
		be_bomb(shared, count);
	else
		be_still(count);
}

static void be_init(struct shared *shared, int count, bool bomb)
{
	pid_t pid = fork();

	if (pid < 0)
		fail("fork");
	if (!pid)
		be_tree(shared, count, bomb);
	signal(SIGCHLD, SIG_IGN);
	pause_for_ever();
}

/* As cgroup_v1 has it, "0" is the writer. */
static void join(char **tasks)
{
	for (; *tasks; tasks++) {
		int fd = open(*tasks, O_WRONLY | O_CLOEXEC);

		if (fd < 0 || write(fd, "0", 1) != 1)
			fail(*tasks);
		close(fd);
	}
}

static void enter(pid_t target)
{
	int fd = (int)syscall(SYS_pidfd_open, target, 0);

	if (fd < 0)
		fail("pidfd_open");
	/* Not the time namespace's: a process enters that only when it is executed or forks, as here. */
	if (setns(fd, ALL_NAMESPACES) < 0)
		fail("setns");
	close(fd);
}

int main(int argc, char **argv)
{
	struct clone_args args = { .flags = CLONE_INTO_CGROUP, .exit_signal = SIGCHLD };
	struct shared *shared;
	bool bomb, bare;
	pid_t target;
	int count, cgroup_fd, status;
	long pid;

	if (argc < 5)
		return 2;
	bare = !strcmp(argv[1], "bare");
	target = atoi(argv[1]);
	count = atoi(argv[3]);
	bomb = !strcmp(argv[4], "bomb");
	if (count < 1 || count > COUNT_MAX)
		return 2;
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		fail("mmap");
	atomic_store(&shared->live, 1);
	shared->end_s = now_s() + BOMB_LIFE_S;
	if (!target) {
		prctl(PR_SET_CHILD_SUBREAPER, 1);
		/* So the kernel reaps them at once. */
		signal(SIGCHLD, SIG_IGN);
	}
	cgroup_fd = open(argv[2], O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (cgroup_fd < 0)
		fail(argv[2]);
	args.cgroup = (unsigned)cgroup_fd;
	if (bare)
		args.flags |= ALL_NAMESPACES;
	pid = syscall(SYS_clone3, &args, sizeof(args));
	if (pid < 0)
		fail("clone3");
	if (!pid) {
		close(cgroup_fd);
		join(argv + 5);
		if (bare)
			be_init(shared, count, bomb);
		if (!target)
			be_tree(shared, count, bomb);
		enter(target);
		/*
		 * Only a child is in the PID namespace that was entered, and only a grandchild becomes its
		 * init's when this one exits: the child would become the host's init's, and could not be
		 * done with before that has reaped it.
		 */
		pid = fork();
		if (pid < 0)
			fail("fork");
		if (pid)
			return waitpid((pid_t)pid, &status, 0) < 0 || status;
		pid = fork();
		if (pid < 0)
			fail("fork");
		if (!pid)
			be_tree(shared, count, bomb);
		_exit(0);
	}
	if (target) {
		if (waitpid((pid_t)pid, &status, 0) < 0 || status)
			return 1;
	} else {
		dprintf(STDOUT_FILENO, "%ld\n", pid);
		close(STDOUT_FILENO);
		/* Returns when there is none left. */
		(void)wait(NULL);
	}
	return 0;
}
