/*
 * nsfs-tracer - changes running processes at their, or their owner's, wish.
 *
 *   nsfs-tracer        descriptor 3: a SOCK_SEQPACKET socket; ends when that is closed
 *
 * Each message is a struct trace_request, answered by a struct trace_reply on the last descriptor that comes with it.  Each
 * is carried out by a child of its own, which waits for it (to start one takes as long as all that it does): so
 * whatever happens to that the kernel lets go of the process traced, which then goes on as it was.
 *
 * TRACE_SESSION: a process that is in a link(2), an ln(1), becomes the session program.  It is seized and interrupted, which
 *   is told, so that the call is answered; when it stops it is made to call socketpair, recvmsg (which gives it the program and the
 *   channel) and execveat.  Its argv and environment are put on its stack, below the red zone.
 *   Meanwhile the container's init starts the user's shell, which is asked for as nsfs-enter would: where that takes no
 *   proof, and where there is no terminal of which only that process can tell.  Should the ln not become a session after
 *   all, the shell finds its input ended.
 *
 * TRACE_MOVE: a process is made to call pidfd_open, setns, close.  The pidfd is of a child of ours which has the
 *   namespaces wanted and otherwise the target's own credentials, so the one setns(2) takes all of them or none, and asks of
 *   the target what it always asks.  We trace with the credentials of whoever wants it, so whether he may is
 *   the kernel's to say.  Nothing of the target's memory is touched.
 *
 * The target goes on as if nothing had been: after the injected calls it is interrupted once more, and only in that stop
 * are its registers restored, so that the kernel itself restarts what it was waiting in (ERESTARTSYS,
 * ERESTART_RESTARTBLOCK with its deadline), as after any stop.
 *
 * References: ptrace(2), setns(2), syscall(2), vdso(7), credentials(7), kernel/signal.c, Documentation/arch.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/major.h>
#include <linux/ptrace.h>
#include <linux/rseq.h>
#include <linux/securebits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "protocol.h"
#include "session.h"

/* <sys/ptrace.h> cannot be had together with <linux/ptrace.h>. */
static long ptrace(long request, pid_t pid, unsigned long address, unsigned long data)
{
	return syscall(SYS_ptrace, request, pid, address, data);
}

#define STOP_WAIT_S 1	/* a process that does not stop in that time is not moved */
#define SESSION_WAIT_S 10	/* the same for an ln(1), which is waiting for us */
#define CONNECT_WAIT_MS 500	/* how long an init may have too many connections */
#define ARGUMENTS_MAX (1 << 20)	/* bytes of argv and environment of a session */
#define N(array) (sizeof(array) / sizeof((array)[0]))

static int reply_fd;
static pid_t target;

/* --- answering --- */

__attribute__((noreturn))
static void answer(int error, uint32_t step, uint32_t stopped_us)
{
	const struct trace_reply reply = { .error = -error, .step = step, .stopped_us = stopped_us };

	(void)send(reply_fd, &reply, sizeof(reply), MSG_NOSIGNAL);
	_exit(0);
}

/* --- what depends on the architecture --- */

#if defined(__x86_64__)

struct registers {
	struct user_regs_struct user;
};

static const unsigned char system_call[] = { 0x0f, 0x05 };

static int get_registers(struct registers *registers)
{
	return ptrace(PTRACE_GETREGS, target, 0, (unsigned long)&registers->user) < 0 ? errno : 0;
}

static int set_registers(const struct registers *registers)
{
	return ptrace(PTRACE_SETREGS, target, 0, (unsigned long)&registers->user) < 0 ? errno : 0;
}

/* Whether it runs 64-bit code, the only that we know to change. */
static bool is_native(const struct registers *registers)
{
	return registers->user.cs == 0x33;
}

static void prepare_call(struct registers *registers, unsigned long at, long number, const unsigned long *arguments)
{
	registers->user.rip = at;
	registers->user.rax = (unsigned long long)number;
	/* Not in a system call: nothing is to be restarted. */
	registers->user.orig_rax = ~0ULL;
	registers->user.rdi = arguments[0];
	registers->user.rsi = arguments[1];
	registers->user.rdx = arguments[2];
	registers->user.r10 = arguments[3];
	registers->user.r8 = arguments[4];
}

static long result_of(const struct registers *registers)
{
	return (long)registers->user.rax;
}

static void set_result(struct registers *registers, long result)
{
	registers->user.rax = (unsigned long long)result;
	registers->user.orig_rax = ~0ULL;
}

static unsigned long stack_of(const struct registers *registers)
{
	return registers->user.rsp - 128;
}

static unsigned long place_of(const struct registers *registers)
{
	return registers->user.rip;
}

static void set_place(struct registers *registers, unsigned long place)
{
	registers->user.rip = place;
}

/* Whether a call that waits was broken off by our stop with an error of its own, where it could just be made again. */
static bool may_repeat(const struct registers *registers)
{
	const struct user_regs_struct *user = &registers->user;

	if ((long)user->rax != -EINTR)
		return false;
	switch ((long)user->orig_rax) {
	case SYS_read: case SYS_pread64: case SYS_readv: case SYS_preadv:
		return true;
	case SYS_epoll_wait: case SYS_epoll_pwait:
		return (int)user->r10 < 0;
	case SYS_rt_sigtimedwait:
		return !user->rdx;
	default:
		return false;
	}
}

static void repeat(struct registers *registers)
{
	registers->user.rax = registers->user.orig_rax;
	registers->user.orig_rax = ~0ULL;
	registers->user.rip -= sizeof(system_call);
}

#elif defined(__aarch64__)

struct registers {
	struct user_regs_struct user;
	int number;	/* of the system call it is in, or -1 */
};

static const unsigned char system_call[] = { 0x01, 0x00, 0x00, 0xd4 };	/* svc #0 */

static int get_registers(struct registers *registers)
{
	struct iovec general = { &registers->user, sizeof(registers->user) };
	struct iovec number = { &registers->number, sizeof(registers->number) };

	return ptrace(PTRACE_GETREGSET, target, NT_PRSTATUS, (unsigned long)&general) < 0 ||
	       ptrace(PTRACE_GETREGSET, target, NT_ARM_SYSTEM_CALL, (unsigned long)&number) < 0 ? errno : 0;
}

static int set_registers(const struct registers *registers)
{
	struct iovec general = { (void *)(uintptr_t)&registers->user, sizeof(registers->user) };
	struct iovec number = { (void *)(uintptr_t)&registers->number, sizeof(registers->number) };

	return ptrace(PTRACE_SETREGSET, target, NT_PRSTATUS, (unsigned long)&general) < 0 ||
	       ptrace(PTRACE_SETREGSET, target, NT_ARM_SYSTEM_CALL, (unsigned long)&number) < 0 ? errno : 0;
}

static bool is_native(const struct registers *registers)
{
	return !(registers->user.pstate & 0x10);	/* PSR_MODE32_BIT */
}

static void prepare_call(struct registers *registers, unsigned long at, long number, const unsigned long *arguments)
{
	registers->user.pc = at;
	registers->user.regs[8] = (unsigned long)number;
	registers->number = -1;
	for (int i = 0; i < 5; i++)
		registers->user.regs[i] = arguments[i];
}

static long result_of(const struct registers *registers)
{
	return (long)registers->user.regs[0];
}

static void set_result(struct registers *registers, long result)
{
	registers->user.regs[0] = (unsigned long)result;
	registers->number = -1;
}

static unsigned long stack_of(const struct registers *registers)
{
	return registers->user.sp;
}

static unsigned long place_of(const struct registers *registers)
{
	return registers->user.pc;
}

static void set_place(struct registers *registers, unsigned long place)
{
	registers->user.pc = place;
}

/* There the kernel prepares the restart before the stop (do_signal()): all that is left is which call continues one
 * that has a deadline. */
static bool may_repeat(const struct registers *registers)
{
	(void)registers;
	return false;
}

static void repeat(struct registers *registers)
{
	(void)registers;
}

#else
#error "how this architecture makes a system call is not known"
#endif

/* --- memory --- */

static struct registers saved;	/* as it was stopped */
static int memory_fd = -1;

static int read_memory(unsigned long at, void *data, size_t size)
{
	return pread(memory_fd, data, size, (off_t)at) == (ssize_t)size ? 0 : EFAULT;
}

static int write_memory(unsigned long at, const void *data, size_t size)
{
	return pwrite(memory_fd, data, size, (off_t)at) == (ssize_t)size ? 0 : EFAULT;
}

static int open_of(const char *what, int flags)
{
	char path[48];

	snprintf(path, sizeof(path), "/proc/%d/%s", (int)target, what);
	return open(path, flags | O_CLOEXEC);
}

/* Where an instruction is that makes a system call; 0 when nowhere: the one that it has just made one by, or one in its
 * vdso. */
static unsigned long find_instruction(void)
{
	static unsigned char code[65536];
	const unsigned long last = place_of(&saved) - sizeof(system_call);
	static char line[4096];
	unsigned long start, end, found = 0;
	FILE *file;
	int fd;

	if (!read_memory(last, code, sizeof(system_call)) && !memcmp(code, system_call, sizeof(system_call)))
		return last;
	fd = open_of("maps", O_RDONLY);
	file = fd < 0 ? NULL : fdopen(fd, "r");
	while (file && fgets(line, sizeof(line), file)) {
		if (!strstr(line, "[vdso]") || sscanf(line, "%lx-%lx", &start, &end) != 2 ||
		    end - start > sizeof(code) || read_memory(start, code, end - start))
			continue;
		for (size_t i = 0; i + sizeof(system_call) <= end - start && !found; i++)
			if (!memcmp(code + i, system_call, sizeof(system_call)))
				found = start + i;
	}
	if (file)
		fclose(file);
	return found;
}

/* --- tracing --- */

static unsigned long instruction;
static uint64_t saved_mask;
static struct timespec stopped_at;

static void out_of_time(int number)
{
	(void)number;
}

/* The next stop of the target; 0 when it has ended, -1 when it does not come in time. */
static int next_stop(void)
{
	int status;

	if (waitpid(target, &status, __WALL) < 0)
		return errno == EINTR ? -1 : 0;
	return WIFSTOPPED(status) ? status : 0;
}

static bool is_event_stop(int status)
{
	return status >> 16 == PTRACE_EVENT_STOP;
}

static void start_timer(void (*action_of)(int), int seconds)
{
	const struct itimerval limit = { .it_value = { .tv_sec = seconds } };
	struct sigaction action = { .sa_handler = action_of };

	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &limit, NULL);
}

static void stop_timer(void)
{
	const struct itimerval none = { .it_value = { .tv_sec = 0 } };

	setitimer(ITIMER_REAL, &none, NULL);
}

static int interrupt(void)
{
	return ptrace(PTRACE_INTERRUPT, target, 0, 0) < 0 ? errno : 0;
}

/* Wait until it has stopped where nothing of it is under way.  Returns 0 or what is in the way. */
static int await_stop(int seconds)
{
	int status;

	start_timer(out_of_time, seconds);
	for (;;) {
		status = next_stop();
		if (status <= 0)
			return status ? EBUSY : ESRCH;
		if (is_event_stop(status))
			break;
		/* A signal that was just about to be delivered: it is. */
		if (ptrace(PTRACE_CONT, target, 0, (unsigned long)WSTOPSIG(status)) < 0)
			return errno;
	}
	clock_gettime(CLOCK_MONOTONIC, &stopped_at);
	/* From here on nothing blocks, and it must not be left as it is. */
	stop_timer();
	/* Stopped by its user: continuing it would be seen. */
	if (WSTOPSIG(status) != SIGTRAP)
		return EBUSY;
	return get_registers(&saved);
}

static uint32_t stopped_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint32_t)((now.tv_sec - stopped_at.tv_sec) * 1000000 + (now.tv_nsec - stopped_at.tv_nsec) / 1000);
}

/* No signal handler runs while it is not itself. */
static int block_signals(void)
{
	const uint64_t all = ~0ULL;

	if (ptrace(PTRACE_GETSIGMASK, target, sizeof(saved_mask), (unsigned long)&saved_mask) < 0 ||
	    ptrace(PTRACE_SETSIGMASK, target, sizeof(all), (unsigned long)&all) < 0)
		return errno;
	return 0;
}

static int unblock_signals(void)
{
	return ptrace(PTRACE_SETSIGMASK, target, sizeof(saved_mask), (unsigned long)&saved_mask) < 0 ? errno : 0;
}

/* Have it make a system call; returns the result or -errno, or 1 << 30 when it has executed a program instead. */
static long inject(long number, const unsigned long *arguments)
{
	struct registers registers = saved;
	int status = 0;

	prepare_call(&registers, instruction, number, arguments);
	if (set_registers(&registers))
		return -ESRCH;
	/* Its entry, then its exit. */
	for (int i = 0; i < 2; i++) {
		if (ptrace(PTRACE_SYSCALL, target, 0, 0) < 0)
			return -ESRCH;
		status = next_stop();
		if (status <= 0)
			return status ? -EBUSY : -ESRCH;
		if (status >> 16 == PTRACE_EVENT_EXEC)
			return 1 << 30;
		if (WSTOPSIG(status) != (SIGTRAP | 0x80))
			/* Some stop in between; the one we wait for is still to come. */
			i--;
	}
	if (get_registers(&registers))
		return -ESRCH;
	return result_of(&registers);
}

/* Give it back its registers where the kernel will look whether a system call is to be restarted. */
static int restore(void)
{
	int status;

	if (ptrace(PTRACE_INTERRUPT, target, 0, 0) < 0 || ptrace(PTRACE_CONT, target, 0, 0) < 0)
		return errno;
	do {
		status = next_stop();
		if (status <= 0)
			return ESRCH;
		if (!is_event_stop(status) && ptrace(PTRACE_CONT, target, 0, 0) < 0)
			return errno;
	} while (!is_event_stop(status));
	if (set_registers(&saved) || unblock_signals())
		return ESRCH;
	return 0;
}

static int seize(unsigned long options)
{
	return ptrace(PTRACE_SEIZE, target, 0, options) < 0 ? errno : 0;
}

static void detach(void)
{
	(void)ptrace(PTRACE_DETACH, target, 0, 0);
}

/* --- who it is --- */

/* Whose rights a process has, by /proc/PID/status. */
struct credentials {
	unsigned int uid[3], gid[3];	/* real, effective, saved */
	gid_t groups[256];
	size_t group_count;
	unsigned long long inheritable, permitted, effective;
	int threads, seccomp;
	int pids[32];		/* NSpid */
	size_t pid_count;
};

static int read_credentials(pid_t pid, struct credentials *found)
{
	char path[48], line[4096];
	FILE *file;

	memset(found, 0, sizeof(*found));
	snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
	file = fopen(path, "re");
	if (!file)
		return ESRCH;
	while (fgets(line, sizeof(line), file)) {
		char *at = strchr(line, ':'), *next;

		if (!at)
			continue;
		at++;
		if (!strncmp(line, "Uid:", 4))
			(void)sscanf(at, "%u %u %u", &found->uid[0], &found->uid[1], &found->uid[2]);
		else if (!strncmp(line, "Gid:", 4))
			(void)sscanf(at, "%u %u %u", &found->gid[0], &found->gid[1], &found->gid[2]);
		else if (!strncmp(line, "CapInh:", 7))
			(void)sscanf(at, "%llx", &found->inheritable);
		else if (!strncmp(line, "CapPrm:", 7))
			(void)sscanf(at, "%llx", &found->permitted);
		else if (!strncmp(line, "CapEff:", 7))
			(void)sscanf(at, "%llx", &found->effective);
		else if (!strncmp(line, "Threads:", 8))
			(void)sscanf(at, "%d", &found->threads);
		else if (!strncmp(line, "Seccomp:", 8))
			(void)sscanf(at, "%d", &found->seccomp);
		else if (!strncmp(line, "Groups:", 7))
			for (; found->group_count < N(found->groups); at = next) {
				const unsigned long group = strtoul(at, &next, 10);

				if (next == at)
					break;
				found->groups[found->group_count++] = (gid_t)group;
			}
		else if (!strncmp(line, "NSpid:", 6))
			for (; found->pid_count < N(found->pids); at = next) {
				const long number = strtol(at, &next, 10);

				if (next == at)
					break;
				found->pids[found->pid_count++] = (int)number;
			}
	}
	fclose(file);
	return found->threads ? 0 : ESRCH;
}

/* --- a session --- */

struct block {
	char *data;
	size_t size;
	unsigned long at;	/* where it will be in the target */
};

static size_t put(struct block *block, size_t at, const void *data, size_t size)
{
	memcpy(block->data + at, data, size);
	return at + size;
}

/* Its environment. */
static char *environment;
static unsigned long environment_at, environment_size;	/* in its memory */

/* Returns 0 or an errno: EBUSY when it has other threads. */
static int read_environment(void)
{
	static char text[4096];
	const int fd = open_of("stat", O_RDONLY);
	const ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	unsigned long end;
	const char *at;
	int field = 2;

	if (fd >= 0)
		close(fd);
	if (length <= 0)
		return ESRCH;
	text[length] = '\0';
	at = strrchr(text, ')');
	/* proc_pid_stat(5): num_threads is field 20, env_start 50. */
	for (; at && field < 50; field++) {
		if (field == 20 && strtol(at, NULL, 10) != 1)
			return EBUSY;
		at = strchr(at + 1, ' ');
	}
	if (!at || sscanf(at, "%lu %lu", &environment_at, &end) != 2 || end < environment_at)
		return EINVAL;
	environment_size = end - environment_at;
	if (environment_size > ARGUMENTS_MAX / 2)
		return E2BIG;
	environment = malloc(environment_size + 1);
	if (!environment)
		return ENOMEM;
	environment[environment_size] = '\0';
	return environment_size && read_memory(environment_at, environment, environment_size) ? EFAULT : 0;
}

/* Where argv and the environment are in the block. */
struct words {
	unsigned long argv, environment;
};

/* argv, which is strings, and the pointers to it and to the environment where that is already. */
static int lay_out(struct block *block, const char *const *argv, struct words *words)
{
	unsigned long pointers[16], none = 0;
	size_t at = 0, argc = 0;

	block->data = malloc(ARGUMENTS_MAX * 8);
	if (!block->data)
		return ENOMEM;
	for (; argv[argc]; argc++) {
		pointers[argc] = at;
		at = put(block, at, argv[argc], strlen(argv[argc]) + 1);
	}
	at = (at + 15) & ~15UL;
	words->argv = at;
	for (size_t i = 0; i < argc; i++)
		at = put(block, at, &pointers[i], sizeof(pointers[i]));
	at = put(block, at, &none, sizeof(none));
	words->environment = at;
	for (size_t i = 0; i < environment_size;) {
		const size_t length = strlen(environment + i);
		const unsigned long place = environment_at + i;

		if (length)
			at = put(block, at, &place, sizeof(place));
		i += length + 1;
	}
	at = put(block, at, &none, sizeof(none));
	block->size = (at + 4095) & ~4095UL;
	block->at = (stack_of(&saved) - block->size - 4096) & ~4095UL;
	/* Now that the place is known. */
	for (size_t i = 0; i < argc; i++) {
		const unsigned long place = block->at + pointers[i];

		memcpy(block->data + words->argv + i * sizeof(place), &place, sizeof(place));
	}
	words->argv += block->at;
	words->environment += block->at;
	return 0;
}

/* Whether one of its descriptors may be a terminal: a character device, and none like /dev/null.  Whoever's filesystem it
 * is of is not asked. */
static bool may_be_terminal(int fd)
{
	char path[48];
	struct statx found;

	snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)target, fd);
	return !statx(AT_FDCWD, path, AT_STATX_DONT_SYNC, STATX_TYPE, &found) && S_ISCHR(found.stx_mode) &&
	       found.stx_rdev_major != MEM_MAJOR;
}

/* One of the two connections to the init that a session takes.  Returns its descriptor or -errno: -EAGAIN when it answers
 * nobody. */
static int connect_to(const char *path)
{
	const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	const struct timeval limit = { .tv_usec = CONNECT_WAIT_MS * 1000 };
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	if (fd < 0)
		return -errno;
	memcpy(address.sun_path, path, strnlen(path, sizeof(address.sun_path) - 1));
	(void)setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	if (connect(fd, (const struct sockaddr *)&address, sizeof(address)))
		return errno == ECONNREFUSED || errno == ENOENT ? -ENODEV : -errno;
	return fd;
}

/* From here on it is in the hands of the session program. */
static void hand_over(int init_fd)
{
	const struct init_request request = { .op = INIT_GIVE };

	(void)send(init_fd, &request, sizeof(request), MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Have the init start the user's shell; returns its token, or 0: the session program is to try. */
static uint64_t ask_init(int init_fd)
{
	uint64_t token;

	environ = calloc(environment_size + 1, sizeof(*environ));
	if (!environ || getrandom(&token, sizeof(token), 0) != sizeof(token))
		return 0;
	for (size_t i = 0, n = 0; i < environment_size; i += strlen(environment + i) + 1)
		if (environment[i])
			environ[n++] = environment + i;
	token |= 1;
	if (compose(token, INIT_OPEN_PIPES, NULL, NULL) ||
	    send(init_fd, message, message_length, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
		return 0;
	return token;
}

/* One message with descriptors, at most three. */
struct packet {
	struct msghdr header;
	struct iovec iov;
	union {
		char buffer[CMSG_SPACE(sizeof(int) * 3)];
		struct cmsghdr align;
	} control;
};

static struct msghdr *packet(struct packet *packet, void *data, size_t size)
{
	packet->iov = (struct iovec){ data, size };
	packet->header = (struct msghdr){ .msg_iov = &packet->iov, .msg_iovlen = 1,
		.msg_control = packet->control.buffer, .msg_controllen = sizeof(packet->control.buffer) };
	return &packet->header;
}

static int send_fds(int to_fd, void *data, size_t size, const int *fds, size_t count)
{
	struct packet sent = { .control = { .buffer = "" } };

	packet(&sent, data, size)->msg_controllen = CMSG_SPACE(sizeof(int) * count);
	sent.control.align = (struct cmsghdr){ .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS,
		.cmsg_len = CMSG_LEN(sizeof(int) * count) };
	memcpy(CMSG_DATA(&sent.control.align), fds, sizeof(int) * count);
	return sendmsg(to_fd, &sent.header, MSG_NOSIGNAL) < 0 ? errno : 0;
}

/* The offer to the session program, as the daemon makes it to one that asks; the shell has been begun unless it has a
 * terminal.  Returns the end of the channel that the session program gets, or -1. */
static int make_offer(const int *init_fds, const char *name)
{
	struct { struct entry_offer offer; char name[256]; } answer = {
		.offer = { .root_uid = ENTRY_NO_PROOF, .root_gid = ENTRY_NO_PROOF } };
	const size_t length = strnlen(name, sizeof(answer.name));
	/* The first would be the user namespace. */
	const int fds[3] = { STDIN_FILENO, init_fds[0], init_fds[1] };
	int ends[2];

	/* Of a 32-bit program, which cannot be changed, the stack is lower. */
	if (environment_at >> 32 && !(may_be_terminal(0) && may_be_terminal(1)))
		answer.offer.token = ask_init(init_fds[0]);
	else
		hand_over(init_fds[0]);
	hand_over(init_fds[1]);
	memcpy(answer.name, name, length);
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) ||
	    send_fds(ends[0], &answer, sizeof(answer.offer) + length, fds, N(fds)))
		return -1;
	close(ends[0]);
	return ends[1];
}

/* Have the target receive two descriptors; their numbers in it are returned in `theirs`. */
static int give(const int *fds, int *theirs, unsigned long at)
{
	struct {
		struct msghdr header;
		struct iovec iov;
		union {
			char buffer[CMSG_SPACE(sizeof(int) * 2)];
			struct cmsghdr align;
		} control;
		int pair[2];
		char byte;
	} area = { .byte = 0 };
	const unsigned long pair_arguments[5] = {
		AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, at + offsetof(typeof(area), pair) };
	int pid_fd, ours, error;
	char none = 0;
	long result;

	result = inject(SYS_socketpair, pair_arguments);
	if (result < 0)
		return (int)-result;
	if (read_memory(at + offsetof(typeof(area), pair), area.pair, sizeof(area.pair)))
		return EFAULT;
	pid_fd = (int)syscall(SYS_pidfd_open, target, 0);
	ours = (int)syscall(SYS_pidfd_getfd, pid_fd, area.pair[0], 0);
	if (ours < 0)
		return errno;
	if ((error = send_fds(ours, &none, sizeof(none), fds, 2)))
		return error;
	area.iov.iov_base = (char *)at + offsetof(typeof(area), byte);
	area.iov.iov_len = 1;
	area.header.msg_iov = (struct iovec *)(at + offsetof(typeof(area), iov));
	area.header.msg_iovlen = 1;
	area.header.msg_control = (char *)at + offsetof(typeof(area), control);
	area.header.msg_controllen = sizeof(area.control);
	if (write_memory(at, &area, sizeof(area)))
		return EFAULT;
	result = inject(SYS_recvmsg, (const unsigned long[5]){
		(unsigned long)area.pair[1], at + offsetof(typeof(area), header), 0 });
	if (result < 0)
		return (int)-result;
	if (read_memory(at + offsetof(typeof(area), control), &area.control, sizeof(area.control)))
		return EFAULT;
	if (area.control.align.cmsg_type != SCM_RIGHTS ||
	    area.control.align.cmsg_len != CMSG_LEN(sizeof(int) * 2))
		return EMFILE;
	memcpy(theirs, CMSG_DATA(&area.control.align), sizeof(int) * 2);
	return 0;
}

static int become_session(const int *fds, const char *name)
{
	const char *argv[] = { "nsfs-enter", "--channel", NULL, name, NULL };
	struct block block = { .data = NULL };
	struct words words;
	char number[16];
	int theirs[2], error;
	long result;

	if (!is_native(&saved))
		return EOPNOTSUPP;
	instruction = find_instruction();
	if (!instruction)
		return EOPNOTSUPP;
	if ((error = block_signals()))
		return error;
	error = give(fds, theirs, (stack_of(&saved) - 1024) & ~15UL);
	if (error)
		return error;
	snprintf(number, sizeof(number), "%d", theirs[1]);
	argv[2] = number;
	if ((error = lay_out(&block, argv, &words)))
		return error;
	if (write_memory(block.at, block.data, block.size))
		return EFAULT;
	result = inject(SYS_execveat, (const unsigned long[5]){
		(unsigned long)theirs[0], block.at + strlen(argv[0]), words.argv, words.environment, AT_EMPTY_PATH });
	return result == 1 << 30 ? 0 : result < 0 ? (int)-result : EIO;
}

/* Its filter, if it has one, is for what it does itself. */
static int seize_ln(void)
{
	const unsigned long options = PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEEXEC;
	static struct credentials whose;
	int error = seize(options | PTRACE_O_SUSPEND_SECCOMP);

	/* Not without CONFIG_CHECKPOINT_RESTORE; who has no filter does not need it. */
	if (error && !(error = read_credentials(target, &whose)))
		error = whose.seccomp ? EOPNOTSUPP : seize(options);
	return error;
}

/* fds: the session program, and the channel if the daemon has one; else init_path is where the init listens. */
__attribute__((noreturn))
static void session(const int *fds, const char *name, const char *init_path)
{
	const char told = TRACE_INTERRUPTED;
	int given[2] = { fds[0], fds[1] }, init_fds[2] = { -1, -1 }, error = 0;

	/* Whoever has part in its memory could keep us waiting: we die of it. */
	start_timer(SIG_DFL, SESSION_WAIT_S);
	if ((memory_fd = open_of("mem", O_RDWR)) < 0)
		error = errno;
	if (!error)
		error = read_environment();
	for (size_t i = 0; i < N(init_fds) && init_path && !error; i++)
		if ((init_fds[i] = connect_to(init_path)) < 0)
			error = -init_fds[i];
	if (!error)
		error = seize_ln();
	if (!error)
		error = interrupt();
	if (error)
		answer(error, STEP_PROCESS, 0);
	/* The shell first: it is what takes longest. */
	if (init_path)
		given[1] = make_offer(init_fds, name);
	(void)send(reply_fd, &told, sizeof(told), MSG_NOSIGNAL);
	error = await_stop(SESSION_WAIT_S);
	if (error)
		answer(error, STEP_DEADLINE, 0);
	error = given[1] < 0 ? EMFILE : become_session(given, name);
	if (!error) {
		if (unblock_signals())
			error = ESRCH;
		detach();
		answer(error, STEP_EXEC, stopped_us());
	}
	/* It goes on as an ln whose link(2) has failed. */
	set_result(&saved, -error);
	(void)restore();
	detach();
	answer(error, STEP_EXEC, stopped_us());
}

/* --- a move in place --- */

static bool shares(pid_t one, pid_t other, const char *type)
{
	struct stat first, second;
	char path[48];

	snprintf(path, sizeof(path), "/proc/%d/ns/%s", (int)one, type);
	if (stat(path, &first))
		return false;
	snprintf(path, sizeof(path), "/proc/%d/ns/%s", (int)other, type);
	return !stat(path, &second) && first.st_ino == second.st_ino;
}

static int set_capabilities(unsigned long long permitted, unsigned long long effective,
			    unsigned long long inheritable)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[2];

	for (int i = 0; i < 2; i++)
		data[i] = (struct __user_cap_data_struct){
			.effective = (uint32_t)(effective >> 32 * i),
			.permitted = (uint32_t)(permitted >> 32 * i),
			.inheritable = (uint32_t)(inheritable >> 32 * i) };
	return syscall(SYS_capset, &header, data) ? errno : 0;
}

/* Get somebody's credentials; user_pid_fd: a process in the user namespace that goes with them, or -1 for our own.  The IDs
 * are the host's, so they come first; our capabilities stay (SECBIT_NO_SETUID_FIXUP). */
static int adopt(const struct credentials *whose, int user_pid_fd, bool capabilities)
{
	if (setgroups(whose->group_count, whose->groups) ||
	    syscall(SYS_setresgid, whose->gid[0], whose->gid[1], whose->gid[2]) ||
	    syscall(SYS_setresuid, whose->uid[0], whose->uid[1], whose->uid[2]))
		return errno;
	if (user_pid_fd >= 0 && setns(user_pid_fd, CLONE_NEWUSER))
		return errno;
	return capabilities ? set_capabilities(whose->permitted, whose->effective, whose->inheritable) :
		set_capabilities(0, 0, 0);
}

/* A child that has the namespaces of the container which are wanted, and else is as the target is: so to it, it is
 * no secret.  It holds no descriptor, and nothing in its memory is worth anything. */
__attribute__((noreturn))
static void be_example(const struct trace_request *wanted, const struct credentials *like, int init_fd,
		       int target_fd, int ready_fd)
{
	const uint32_t others = wanted->types & ~(uint32_t)(CLONE_NEWUSER | CLONE_NEWPID);
	int user_fd = -1, error = 0;
	char unused;

	/* Before /proc is another. */
	if (wanted->types & CLONE_NEWUSER)
		user_fd = init_fd;
	else if (!shares(target, getppid(), "user"))
		user_fd = target_fd;
	if (others && setns(init_fd, (int)others))
		error = errno;
	if (!error)
		error = adopt(like, user_fd, false);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	prctl(PR_SET_DUMPABLE, 1);
	(void)!write(ready_fd, &error, sizeof(error));
	/* Until the end of all: our parent has the other end. */
	(void)dup2(ready_fd, 0);
	syscall(SYS_close_range, 1, ~0U, 0);
	(void)!read(0, &unused, 1);
	_exit(0);
}

/* Start that child; its PID as the target knows it goes to *number.  Returns 0 or an errno. */
static int start_example(const struct trace_request *wanted, const struct credentials *like, int *number)
{
	const int init_fd = (int)syscall(SYS_pidfd_open, wanted->init, 0);
	const int target_fd = (int)syscall(SYS_pidfd_open, target, 0);
	struct credentials found;
	int ends[2], error, pid_ns_fd = -1;
	pid_t pid;

	if (init_fd < 0 || target_fd < 0)
		return errno;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
		return errno;
	/* Where the target can name it.  Only the children of one who joins are in it. */
	if (wanted->types & CLONE_NEWPID)
		pid_ns_fd = init_fd;
	else if (!shares(target, getpid(), "pid"))
		pid_ns_fd = target_fd;
	if (pid_ns_fd >= 0 && setns(pid_ns_fd, CLONE_NEWPID))
		return errno;
	pid = fork();
	if (!pid) {
		close(ends[0]);
		be_example(wanted, like, init_fd, target_fd, ends[1]);
	}
	if (pid < 0)
		return errno;
	close(ends[1]);
	close(init_fd);
	close(target_fd);
	if (read(ends[0], &error, sizeof(error)) != sizeof(error))
		return EIO;
	if (error)
		return error;
	if ((error = read_credentials(pid, &found)))
		return error;
	if (!like->pid_count || found.pid_count < like->pid_count)
		return EPERM;
	*number = found.pids[like->pid_count - 1];
	return *number > 0 ? 0 : EPERM;
}

/* As the kernel does it with who is preempted in a restartable sequence: it begins again. */
static void abort_sequence(void)
{
	struct ptrace_rseq_configuration rseq;
	struct rseq_cs section;
	uint64_t pointer, place = place_of(&saved);

	if (ptrace(PTRACE_GET_RSEQ_CONFIGURATION, target, sizeof(rseq), (unsigned long)&rseq) < 0 ||
	    !rseq.rseq_abi_pointer ||
	    read_memory(rseq.rseq_abi_pointer + offsetof(struct rseq, rseq_cs), &pointer, sizeof(pointer)) ||
	    !pointer || read_memory(pointer, &section, sizeof(section)))
		return;
	if (place - section.start_ip < section.post_commit_offset)
		set_place(&saved, section.abort_ip);
}

static bool has_signal(void)
{
	char path[48], line[256];
	unsigned long long pending = 0, each;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%d/status", (int)target);
	file = fopen(path, "re");
	while (file && fgets(line, sizeof(line), file))
		if (sscanf(line, "SigPnd: %llx", &each) == 1 || sscanf(line, "ShdPnd: %llx", &each) == 1)
			pending |= each;
	if (file)
		fclose(file);
	return pending & ~saved_mask;
}

static int join_in_place(uint32_t types, int example)
{
	long fd, result;

	if (!is_native(&saved))
		return EPERM;
	memory_fd = open_of("mem", O_RDONLY);
	if (memory_fd < 0)
		return errno;
	instruction = find_instruction();
	if (!instruction)
		return EPERM;
	if (block_signals())
		return ESRCH;
	fd = inject(SYS_pidfd_open, (const unsigned long[5]){ (unsigned long)example, 0 });
	if (fd < 0)
		return (int)-fd;
	result = inject(SYS_setns, (const unsigned long[5]){ (unsigned long)fd, types });
	(void)inject(SYS_close, (const unsigned long[5]){ (unsigned long)fd });
	return (int)-result;
}

__attribute__((noreturn))
static void move(const struct trace_request *wanted)
{
	static struct credentials like, caller;
	const bool self = wanted->caller == wanted->target;
	unsigned long options = PTRACE_O_TRACESYSGOOD;
	int caller_fd = -1, example = 0, error;
	uint32_t stopped = 0;

	if ((error = read_credentials(target, &like)))
		answer(error, STEP_PROCESS, 0);
	if (like.threads != 1)
		answer(EBUSY, STEP_PROCESS, 0);
	if (!self) {
		if ((error = read_credentials(wanted->caller, &caller)))
			answer(error, STEP_PROCESS, 0);
		if (!shares(wanted->caller, getpid(), "user"))
			caller_fd = (int)syscall(SYS_pidfd_open, wanted->caller, 0);
	}
	if ((error = start_example(wanted, &like, &example)))
		answer(error, STEP_JOIN, 0);
	/* While it is stopped nobody is to come between. */
	(void)sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){ .sched_priority = 1 });
	if (!self) {
		if ((error = adopt(&caller, caller_fd, true)))
			answer(error, STEP_IDENTITY, 0);
		prctl(PR_SET_DUMPABLE, 0);
	}
	/* Its filter is for what it does itself. */
	if (like.seccomp)
		options |= PTRACE_O_SUSPEND_SECCOMP;
	if ((error = seize(options)))
		answer(error, STEP_PROCESS, 0);
	if ((error = interrupt()) || (error = await_stop(STOP_WAIT_S))) {
		detach();
		answer(error, STEP_DEADLINE, 0);
	}
	error = join_in_place(wanted->types, example);
	if (self)
		set_result(&saved, -error);
	else if (may_repeat(&saved) && !has_signal())
		repeat(&saved);
	abort_sequence();
	if (restore())
		error = ESRCH;
	stopped = stopped_us();
	detach();
	answer(error, STEP_JOIN, stopped);
}

/* --- requests --- */

/* One request, by a child that was there before it came. */
__attribute__((noreturn))
static void serve(int taken_fd)
{
	/* Two strings at most. */
	static struct { struct trace_request head; char name[512]; } received;
	union {
		char buffer[CMSG_SPACE(sizeof(int) * 4)];
		struct cmsghdr align;
	} control;
	struct iovec iov = { &received, sizeof(received) - 2 };
	struct msghdr header = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control.buffer, .msg_controllen = sizeof(control.buffer) };
	const struct cmsghdr *rights;
	size_t count = 0;
	ssize_t length;
	int fds[4];

	signal(SIGCHLD, SIG_DFL);
	/* The next daemon is asked the same, and has another tracer. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	do
		length = recvmsg(SPAWNER_SOCKET_FD, &header, MSG_CMSG_CLOEXEC);
	while (length < 0 && errno == EINTR);
	if (length < (ssize_t)sizeof(received.head))
		_exit(1);
	/* Now another is to wait in our place. */
	(void)!write(taken_fd, "", 1);
	close(taken_fd);
	rights = CMSG_FIRSTHDR(&header);
	if (rights && rights->cmsg_level == SOL_SOCKET && rights->cmsg_type == SCM_RIGHTS) {
		count = (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(fds, CMSG_DATA(rights), count * sizeof(int));
	}
	/* Should we die, that descriptor's end tells. */
	if (!count)
		_exit(1);
	reply_fd = fds[--count];
	target = received.head.target;
	if (received.head.op == TRACE_SESSION && count == 2)
		session(fds, received.name, NULL);
	if (received.head.op == TRACE_SESSION && count == 1) {
		fds[1] = -1;
		session(fds, received.name, received.name + strlen(received.name) + 1);
	}
	if (received.head.op == TRACE_MOVE && !count)
		move(&received.head);
	answer(EINVAL, STEP_REQUEST, 0);
}

/* Start a child that waits for a request; returns a descriptor that is readable when it has one or has died, or -1. */
static int start_child(void)
{
	int ends[2];
	pid_t pid;

	if (pipe2(ends, O_CLOEXEC))
		return -1;
	pid = fork();
	if (!pid) {
		close(ends[0]);
		serve(ends[1]);
	}
	close(ends[1]);
	if (pid > 0)
		return ends[0];
	close(ends[0]);
	return -1;
}

int main(void)
{
	/* Two, so that while one begins with its request the next can be taken without waiting for a fork. */
	struct pollfd polled[3] = { { .fd = -1 }, { .fd = -1 }, { .fd = SPAWNER_SOCKET_FD } };
	char unread;
	int null_fd;

	null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	for (int fd = 0; fd < 2; fd++)
		if (dup2(null_fd, fd) < 0)
			return 1;
	syscall(SYS_close_range, SPAWNER_SOCKET_FD + 1, ~0U, 0);
	prctl(PR_SET_NAME, "nsfs-tracer");
	prctl(PR_SET_DUMPABLE, 0);
	prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0);
	signal(SIGCHLD, SIG_IGN);
	for (;;) {
		for (int i = 0; i < 2; i++)
			if (polled[i].fd < 0) {
				polled[i].fd = start_child();
				polled[i].events = POLLIN;
			}
		if (polled[0].fd < 0 && polled[1].fd < 0) {
			/* No process is to be had: so it goes to whoever asks now.  The end of the descriptor that came along
			 * tells. */
			if (recv(SPAWNER_SOCKET_FD, &unread, sizeof(unread), 0) <= 0 && errno != EINTR)
				return 0;
			continue;
		}
		if (poll(polled, N(polled), -1) < 0)
			continue;
		if (polled[2].revents)
			return 0;
		/* They come first. */
		usleep(1000);
		for (int i = 0; i < 2; i++)
			if (polled[i].revents) {
				close(polled[i].fd);
				polled[i].fd = -1;
			}
	}
}
