/*
 * nsfs-interposer.so - stands between libfuse and /dev/fuse in the daemon.
 *
 * Preloaded into it by the supervisor.  It replaces one function, fuse_session_mount(), and only for
 * the descriptor that the supervisor handed down: the session is given a read and a writev of its own
 * by fuse_session_custom_io(3).  (Without a splice of its own libfuse uses none.)  They
 *
 *   - record each request in the memfd that the supervisor keeps (inflight.h) and hand what an
 *     earlier daemon left unanswered to this one;
 *   - say which request is being dispatched, which pyfuse3 hides;
 *   - repeat the answers of LOOKUPs for as long as what they depend on is there (answer_again());
 *   - pass each INTERRUPT, which pyfuse3 ignores, to the event loop through a pipe.
 *
 * Why no request is lost or done twice.  The kernel copies a request into the landing; it is recorded
 * in a slot before the landing is declared free, and the slot is freed only after the reply was
 * written.  So a daemon killed at any instant leaves each unanswered request in the landing or in a
 * slot.  It may leave an answered one too: the next daemon asks the kernel about each (is_waiting).
 * The landing is kept in memory: the kernel fails a request with EIO if it meets a page that is not
 * there while a SIGKILL is pending.
 *
 * Requests are read and answered by one thread, as pyfuse3 does; notifications come from any thread.
 *
 * Sources: fuse(4), linux/fuse.h, fs/fuse/dev.c (fuse_dev_do_read, fuse_dev_do_write).
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 312

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse_lowlevel.h>
#include <link.h>
#include <poll.h>
#include <signal.h>
#include <linux/fuse.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "inflight.h"

#define NO_SLOT UINT16_MAX
#define ANSWERS 1024U
#define ANSWER_PATH 64
#define ANSWER_NAME 64
#define FOLLOWS_NS 20000
#define FOLLOWING 16		/* then others have their turn */
#define ANSWER_MS 1000U		/* as long as the kernel is told to believe what is deeper */
_Static_assert(INFLIGHT_SLOTS <= NO_SLOT, "slots are numbered by uint16_t");
_Static_assert((INFLIGHT_SLOTS & (INFLIGHT_SLOTS - 1)) == 0, "bucket_of() masks");

static uint8_t *base;			/* the memfd, mapped */
static struct inflight_head *head;	/* NULL: not attached */
static uint32_t *used;			/* by slot: bytes recorded in it, 0: free */
static int session_fd = -1;		/* what the event loop waits on; the device, once all is replayed */
static int device_fd = -1;		/* always the device */
static int interrupt_fd = -1;

static uint16_t free_slots[INFLIGHT_SLOTS];	/* a stack, so that few pages are ever touched */
static unsigned free_count;
static uint16_t bucket[INFLIGHT_SLOTS], chain[INFLIGHT_SLOTS];	/* slots by unique */

static bool init_due;			/* libfuse has to be given the stored INIT */
/* What a LOOKUP was answered, and what has to be there for it to be answered the same again. */
struct answer {
	uint64_t nodeid;		/* 0: none */
	uint64_t until_ms;		/* CLOCK_MONOTONIC_COARSE */
	pid_t pid;			/* a process; 0: none */
	int dir_fd;			/* from which path is looked up; -1: nothing is */
	char path[ANSWER_PATH];		/* a symbolic link, wherever it leads */
	char name[ANSWER_NAME];
	struct {
		struct fuse_out_header out;
		struct fuse_entry_out entry;
	} reply;
};

static struct answer answers[ANSWERS];
static struct answer promised;		/* what is known of the answer that is about to be written */
static uint64_t promised_unique;	/* 0: none is */

static uint16_t replay[INFLIGHT_SLOTS];	/* slots to hand out, oldest first */
static unsigned replay_count, replay_next;

static struct fuse_in_header *slot_at(unsigned slot)
{
	return (void *)(base + INFLIGHT_FIRST_SLOT + (size_t)slot * INFLIGHT_SLOT_BYTES);
}

static struct fuse_in_header *landing(void)
{
	return (void *)(base + INFLIGHT_LANDING);
}

static uint64_t *polls(void)
{
	return (void *)(base + INFLIGHT_FIRST_POLL);
}

/* The next daemon relies on what was stored before this being there as well. */
static void store(uint32_t *where, uint32_t value)
{
	__atomic_store_n(where, value, __ATOMIC_RELEASE);
}

/* The kernel's uniques are consecutive even numbers. */
static uint16_t *bucket_of(uint64_t unique)
{
	return &bucket[(unique >> 1) & (INFLIGHT_SLOTS - 1)];
}

/* Where the number of the slot that holds unique is linked; NO_SLOT is linked there if none does. */
static uint16_t *find(uint64_t unique)
{
	uint16_t *link = bucket_of(unique);

	while (*link != NO_SLOT && slot_at(*link)->unique != unique)
		link = &chain[*link];
	return link;
}

static void add(uint16_t slot)
{
	uint16_t *link = bucket_of(slot_at(slot)->unique);

	chain[slot] = *link;
	*link = slot;
}

/* False if too few slots are free for such a request. */
static bool record(const struct fuse_in_header *in)
{
	unsigned reserve = in->opcode == FUSE_READ ? INFLIGHT_RESERVE : 0;
	uint16_t slot;

	if (free_count <= reserve)
		return false;
	slot = free_slots[--free_count];
	memcpy(slot_at(slot), in, in->len);
	store(&used[slot], in->len);
	add(slot);
	return true;
}

/* It has no slot: each daemon's libfuse is given it. */
static void record_init(const struct fuse_in_header *in)
{
	memcpy(head->init, in, in->len);
	store(&head->init_bytes, in->len);
}

/* After its reply was written. */
static void release(uint64_t unique)
{
	uint16_t *link = find(unique), slot = *link;

	if (slot == NO_SLOT)
		return;
	*link = chain[slot];
	store(&used[slot], 0);
	free_slots[free_count++] = slot;
}

/* Answer with an error on libfuse's behalf; 0 or an errno. */
static int reply_error(int fd, uint64_t unique, int error)
{
	struct fuse_out_header out = { .len = sizeof(out), .error = -error, .unique = unique };

	return write(fd, &out, sizeof(out)) < 0 ? errno : 0;
}

/*
 * Does somebody wait for the answer to this request?  An INTERRUPT has the unique of its target with
 * bit 0 set, and the answer EAGAIN to it asks the kernel to send it again.  The kernel says ENOENT
 * when there is no such request any more, EINVAL when it was not interrupted; else the INTERRUPT that
 * the earlier daemon consumed comes once more, which is wanted too.
 */
static bool is_waiting(int fd, uint64_t unique)
{
	return reply_error(fd, unique | 1, EAGAIN) != ENOENT;
}

static bool needs_reply(uint32_t opcode)
{
	return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET && opcode != FUSE_INTERRUPT &&
	       opcode != FUSE_NOTIFY_REPLY;
}

/*
 * Every file is opened for direct I/O, so what is to fill a page of the page cache comes of a private
 * mapping (mmap(2)) or of sendfile(2).  (fuse_send_read(): other reads have an owner.)
 */
static bool fills_page(const struct fuse_in_header *in)
{
	const struct fuse_read_in *wanted = (const struct fuse_read_in *)(in + 1);

	return in->opcode == FUSE_READ && in->len >= sizeof(*in) + sizeof(*wanted) &&
	       !(wanted->read_flags & FUSE_READ_LOCKOWNER);
}

static int by_unique(const void *left, const void *right)
{
	uint64_t a = slot_at(*(const uint16_t *)left)->unique;
	uint64_t b = slot_at(*(const uint16_t *)right)->unique;

	return (a > b) - (a < b);
}

/* Build the tables from what the memfd holds. */
static void take_stock(int fd)
{
	struct fuse_in_header *in = landing();

	memset(bucket, 0xff, sizeof(bucket));
	free_count = replay_count = 0;
	for (unsigned slot = INFLIGHT_SLOTS; slot-- > 0; ) {
		if (used[slot] && is_waiting(fd, slot_at(slot)->unique)) {
			add((uint16_t)slot);
		} else {
			store(&used[slot], 0);
			free_slots[free_count++] = (uint16_t)slot;
		}
	}
	/* Killed in the midst of record(): the landing may hold what a slot holds as well. */
	if (in->len && in->opcode == FUSE_INIT && !head->init_bytes && in->len <= sizeof(head->init)) {
		record_init(in);
	} else if (in->len && needs_reply(in->opcode) && in->opcode != FUSE_INIT &&
		   *find(in->unique) == NO_SLOT && is_waiting(fd, in->unique) && !record(in)) {
		reply_error(fd, in->unique, EBUSY);
	}
	store(&in->len, 0);
	/* What several daemons in turn died of at once must not end the filesystem for all. */
	if (head->crashes >= 3 && *find(head->current.unique) != NO_SLOT) {
		reply_error(fd, head->current.unique, EIO);
		release(head->current.unique);
	}
	for (unsigned slot = 0; slot < INFLIGHT_SLOTS; slot++)
		if (used[slot])
			replay[replay_count++] = (uint16_t)slot;
	qsort(replay, replay_count, sizeof(replay[0]), by_unique);
	init_due = head->init_bytes != 0;
	head->takeover = init_due && !is_waiting(fd, ((struct fuse_in_header *)head->init)->unique);
}

/*
 * pyfuse3 has no operation for LSEEK, but one for READ, whose answer is bytes: the eight of a struct
 * fuse_lseek_out will do.  head->current tells what it is, the offset the rest (takeover.seek()).  An
 * answer of ENOSYS, which is libfuse's, would end SEEK_DATA for the whole mount.
 */
static ssize_t as_read(struct fuse_in_header *in)
{
	const struct fuse_lseek_in seek = *(const struct fuse_lseek_in *)(in + 1);
	struct fuse_read_in *read_in = (struct fuse_read_in *)(in + 1);

	*read_in = (struct fuse_read_in){
		.fh = seek.fh,
		.offset = (uint64_t)(seek.whence & 7) << INFLIGHT_WHENCE_SHIFT |
			  (seek.offset & ((1ULL << INFLIGHT_WHENCE_SHIFT) - 1)),
		.size = sizeof(struct fuse_lseek_out),
	};
	in->opcode = FUSE_READ;
	in->len = sizeof(*in) + sizeof(*read_in);
	return (ssize_t)in->len;
}

static ssize_t hand_over(const struct fuse_in_header *in, size_t bytes, bool replayed,
			 void *buffer, size_t size)
{
	if (bytes > size) {
		reply_error(device_fd, in->unique, EIO);
		release(in->unique);
		errno = EINTR;
		return -1;
	}
	memcpy(buffer, in, bytes);
	head->current = (struct inflight_request){
		.unique = in->unique, .nodeid = in->nodeid, .opcode = in->opcode,
		.pid = in->pid, .uid = in->uid, .gid = in->gid, .replayed = replayed,
		.fills_page = fills_page(in),
	};
	if (in->opcode == FUSE_POLL && bytes >= sizeof(*in) + sizeof(struct fuse_poll_in)) {
		const uint64_t kh = ((const struct fuse_poll_in *)(in + 1))->kh;

		/* The kernel numbers open files; one of 4096 is forgotten where two have one place. */
		polls()[kh % INFLIGHT_POLLS] = kh;
	}
	if (in->opcode == FUSE_LSEEK && bytes == sizeof(*in) + sizeof(struct fuse_lseek_in) &&
	    size >= sizeof(*in) + sizeof(struct fuse_read_in))
		return as_read(buffer);
	return (ssize_t)bytes;
}

/*
 * Without FUSE_MAX_PAGES libfuse allocates 132 KiB for each request instead of a megabyte, and the
 * kernel sends 128 KiB at most.  Without the other two every read is a synchronous one: those that
 * somebody submits by io_submit(2) or by a mapping would be background requests, which no signal
 * interrupts, so that one which waits for a record would keep a killed process, and a dozen would keep
 * every release(2) of the mount.
 */
static ssize_t hand_over_init(void *buffer, size_t size)
{
	const uint32_t refused = FUSE_MAX_PAGES | FUSE_ASYNC_READ | FUSE_ASYNC_DIO;
	struct fuse_in_header *in = (void *)head->init;
	ssize_t bytes = hand_over(in, head->init_bytes, head->takeover, buffer, size);

	if (bytes >= (ssize_t)(sizeof(*in) + offsetof(struct fuse_init_in, flags2)))
		((struct fuse_init_in *)((uint8_t *)buffer + sizeof(*in)))->flags &= ~refused;
	return bytes;
}

/*
 * Should the pipe be full the kernel is asked to send the INTERRUPT again, which it does at once and
 * before any other request: so only an event loop that does not read the pipe at all is kept busy.
 */
static void pass_interrupt(const struct fuse_in_header *in)
{
	uint64_t target = ((const struct fuse_interrupt_in *)(in + 1))->unique;

	if (*find(target) == NO_SLOT)
		return;				/* was answered meanwhile */
	if (write(interrupt_fd, &target, sizeof(target)) != sizeof(target))
		reply_error(device_fd, in->unique, EAGAIN);
}

/* pyfuse3 takes EINTR, and no other error, to mean that it shall wait for the next request. */
static ssize_t nothing(void)
{
	store(&landing()->len, 0);
	errno = EINTR;
	return -1;
}

static uint64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* Where the answer to a LOOKUP is kept: FNV-1a. */
static struct answer *answer_for(uint64_t nodeid, const char *name)
{
	uint32_t hash = 2166136261U ^ (uint32_t)nodeid ^ (uint32_t)(nodeid >> 32);

	while (*name)
		hash = (hash ^ (uint8_t)*name++) * 16777619U;
	return &answers[hash % ANSWERS];
}

/* The name that a LOOKUP asks for, or NULL for what is none or too long. */
static const char *looked_up(const struct fuse_in_header *in)
{
	const char *name = (const char *)(in + 1);

	if (in->opcode != FUSE_LOOKUP || in->len <= sizeof(*in))
		return NULL;
	return strnlen(name, in->len - sizeof(*in)) < ANSWER_NAME ? name : NULL;
}

static bool still_holds(const struct answer *answer)
{
	char link;

	return now_ms() < answer->until_ms &&
	       (!answer->pid || !kill(answer->pid, 0)) &&
	       (answer->dir_fd < 0 ||
		readlinkat(answer->dir_fd, answer->path, &link, sizeof(link)) > 0);
}

/*
 * What stands in a tagged directory is looked up at each walk of a path (entry_timeout 0): it is to be
 * gone once its namespace is, or it itself, and nobody who changes an interface or kills an init waits
 * until somebody has had the kernel forget a name.  Nearly always it is there as it was before.  To
 * see that takes two system calls; through the daemon it would be as long as an OPEN or a READ.
 */
static bool answer_again(const struct fuse_in_header *in, size_t bytes)
{
	const char *name = bytes >= sizeof(*in) && bytes == in->len ? looked_up(in) : NULL;
	struct answer *answer = name ? answer_for(in->nodeid, name) : NULL;

	if (!answer || answer->nodeid != in->nodeid || strcmp(answer->name, name))
		return false;
	if (!still_holds(answer)) {
		answer->nodeid = 0;
		return false;
	}
	answer->reply.out.unique = in->unique;
	/* ENOENT: nobody waits for it any more. */
	return write(device_fd, &answer->reply, answer->reply.out.len) >= 0 || errno == ENOENT;
}

/* The answer that was promised is about to be written. */
static void keep_answer(const struct iovec *iov, int count)
{
	uint16_t slot = *find(promised_unique);
	const char *name = slot == NO_SLOT ? NULL : looked_up(slot_at(slot));
	const struct fuse_out_header *out = iov[0].iov_base;

	promised_unique = 0;
	if (!name || out->error || count != 2 || iov[0].iov_len != sizeof(promised.reply.out) ||
	    iov[1].iov_len > sizeof(promised.reply.entry))
		return;
	promised.nodeid = slot_at(slot)->nodeid;
	promised.until_ms = now_ms() + ANSWER_MS;
	strcpy(promised.name, name);
	promised.reply.out = *out;
	memcpy(&promised.reply.entry, iov[1].iov_base, iov[1].iov_len);
	*answer_for(promised.nodeid, name) = promised;
}

/*
 * For the daemon (nsfs/syscalls.py): the answer that the LOOKUP of that number is about to be given may
 * be repeated to whoever asks for the next second, as long as a process is there and a symbolic link.
 */
__attribute__((visibility("default")))
void nsfs_interposer_keep_answer(uint64_t unique, int pid, int dir_fd, const char *path)
{
	if (strlen(path) >= sizeof(promised.path))
		return;
	promised_unique = unique;
	promised.pid = pid;
	promised.dir_fd = dir_fd;
	strcpy(promised.path, path);
}

/* For the daemon: what it would answer may have changed, or a descriptor is about to be closed. */
__attribute__((visibility("default")))
void nsfs_interposer_forget_answers(void)
{
	promised_unique = 0;
	for (unsigned i = 0; i < ANSWERS; i++)
		if (answers[i].nodeid)
			answers[i].nodeid = 0;
}

/*
 * Who has walked a path is about to open what it leads to, or to look up the next: some microseconds
 * later.  To go through the event loop, only to wait there, takes longer.
 */
static bool another_follows(void)
{
	const struct timespec moment = { .tv_nsec = FOLLOWS_NS };
	struct pollfd device = { .fd = device_fd, .events = POLLIN };

	return ppoll(&device, 1, &moment, NULL) > 0;
}

static ssize_t read_device(void *buffer, size_t size)
{
	struct fuse_in_header *in = landing();
	ssize_t bytes = read(device_fd, in, INFLIGHT_SLOT_BYTES);

	for (unsigned i = 0; bytes > 0 && answer_again(in, (size_t)bytes); i++) {
		store(&in->len, 0);
		if (i == FOLLOWING || !another_follows())
			return nothing();
		bytes = read(device_fd, in, INFLIGHT_SLOT_BYTES);
	}
	if (bytes < 0) {
		if (errno == EAGAIN)		/* its caller was killed before it was read */
			return nothing();
		store(&in->len, 0);
		return -1;
	}
	if ((size_t)bytes < sizeof(*in) || (size_t)bytes != in->len)
		return nothing();
	if (in->opcode == FUSE_INTERRUPT) {
		pass_interrupt(in);
		return nothing();
	}
	if (in->opcode == FUSE_INIT && in->len <= sizeof(head->init)) {
		record_init(in);
		store(&in->len, 0);
		return hand_over_init(buffer, size);
	}
	if (needs_reply(in->opcode) && !record(in)) {
		reply_error(device_fd, in->unique, EBUSY);
		return nothing();
	}
	bytes = hand_over(in, in->len, false, buffer, size);
	store(&in->len, 0);
	return bytes;
}

/* Who waits in poll(2) for a change is to look again: what an earlier daemon would have told. */
static void wake_pollers(void)
{
	struct {
		struct fuse_out_header out;
		struct fuse_notify_poll_wakeup_out poll;
	} message = { .out = { .len = sizeof(message), .error = FUSE_NOTIFY_POLL } };

	for (unsigned i = 0; i < INFLIGHT_POLLS; i++) {
		message.poll.kh = polls()[i];
		polls()[i] = 0;
		/* The file may have been closed. */
		if (message.poll.kh && write(device_fd, &message, sizeof(message)) < 0)
			continue;
	}
}

/* From here on the event loop waits for the device itself. */
static void end_replay(void)
{
	wake_pollers();
	while (dup3(device_fd, session_fd, O_CLOEXEC) < 0 && (errno == EBUSY || errno == EINTR))
		;
}

static ssize_t session_read(int fd, void *buffer, size_t size, void *userdata)
{
	ssize_t bytes;

	(void)fd;
	(void)userdata;
	if (init_due) {
		init_due = false;
		bytes = hand_over_init(buffer, size);
	} else if (replay_next < replay_count) {
		uint16_t slot = replay[replay_next++];

		bytes = hand_over(slot_at(slot), used[slot], true, buffer, size);
	} else {
		return read_device(buffer, size);
	}
	if (replay_next == replay_count)
		end_replay();
	return bytes;
}

/*
 * The kernel must not be allowed to send more in one request than a slot holds.  After a takeover it
 * has had its answer: ENOENT, which libfuse expects of a reply.
 */
static ssize_t write_init_reply(const struct iovec *iov, int count)
{
	struct fuse_init_out limited;
	struct iovec copy[2];

	if (count != 2 || iov[1].iov_len > sizeof(limited) ||
	    iov[1].iov_len < offsetof(struct fuse_init_out, time_gran))
		return writev(device_fd, iov, count);	/* an error, or "another version, please" */
	memcpy(&limited, iov[1].iov_base, iov[1].iov_len);
	if (limited.max_write > INFLIGHT_MAX_WRITE)
		limited.max_write = INFLIGHT_MAX_WRITE;
	copy[0] = iov[0];
	copy[1] = (struct iovec){ .iov_base = &limited, .iov_len = iov[1].iov_len };
	return writev(device_fd, copy, count);
}

static ssize_t session_writev(int fd, struct iovec *iov, int count, void *userdata)
{
	const struct fuse_out_header *out = iov[0].iov_base;
	const struct fuse_in_header *init = (const void *)head->init;
	ssize_t bytes;
	int error;

	(void)fd;
	(void)userdata;
	if (out->unique == 0)			/* a notification */
		return writev(device_fd, iov, count);
	if (head->init_bytes && out->unique == init->unique)
		return write_init_reply(iov, count);
	if (out->unique == promised_unique)
		keep_answer(iov, count);
	bytes = writev(device_fd, iov, count);
	error = errno;
	if (bytes < 0 && error != ENOENT)	/* libfuse drops it now: its caller must not wait for ever */
		reply_error(device_fd, out->unique, EIO);
	release(out->unique);
	errno = error;
	return bytes;
}

/* In the libfuse that the caller was linked with, which need not be the system's; or NULL. */
static void *libfuse_function(const void *caller, const char *name)
{
	void *map = NULL, *function = NULL, *library;
	Dl_info info;

	if (!dladdr1(caller, &info, &map, RTLD_DL_LINKMAP) || !map)
		return NULL;
	library = dlopen(((struct link_map *)map)->l_name, RTLD_LAZY | RTLD_NOLOAD);
	if (library) {
		function = dlvsym(library, name, "FUSE_3.0");
		dlclose(library);	/* it stays loaded, for the caller */
	}
	return function;
}

/* What is to be replayed must wake the event loop, so that waits on something readable until then. */
static int serve(struct fuse_session *session, const void *caller)
{
	static const struct fuse_custom_io io = { .read = session_read, .writev = session_writev };
	int (*custom_io)(struct fuse_session *, const struct fuse_custom_io *, int) =
		(int (*)(struct fuse_session *, const struct fuse_custom_io *, int))
		libfuse_function(caller, "fuse_session_custom_io");
	int always_fd, error;

	if (!custom_io)
		return -ENOSYS;
	device_fd = fcntl(session_fd, F_DUPFD_CLOEXEC, 3);
	if (device_fd < 0)
		return -errno;
	if (init_due) {
		always_fd = eventfd(1, EFD_CLOEXEC);
		if (always_fd < 0 || dup3(always_fd, session_fd, O_CLOEXEC) < 0)
			return -errno;
		close(always_fd);
	}
	error = custom_io(session, &io, session_fd);
	if (!error)
		store(&head->serving, (uint32_t)getpid());
	return error;
}

__attribute__((visibility("default")))
int fuse_session_mount(struct fuse_session *session, const char *mountpoint)
{
	const void *caller = __builtin_return_address(0);
	int (*original)(struct fuse_session *, const char *);
	char path[32];
	int error;

	snprintf(path, sizeof(path), "/dev/fd/%d", session_fd);
	if (!head || strcmp(mountpoint, path)) {
		original = (int (*)(struct fuse_session *, const char *))
			libfuse_function(caller, "fuse_session_mount");
		return original ? original(session, mountpoint) : -1;
	}
	error = serve(session, caller);
	if (error)
		fprintf(stderr, "nsfs-interposer: cannot serve the session: %s\n", strerror(-error));
	return error ? -1 : 0;
}

static int descriptor_from(const char *name)
{
	const char *value = getenv(name);

	return value ? atoi(value) : -1;
}

/* An errno, or 0: done. */
static int attach(int fuse_fd, int inflight_fd)
{
	uint32_t magic;
	int pipe_fds[2];
	struct stat st;
	void *map;

	if (fstat(inflight_fd, &st) < 0 || pread(inflight_fd, &magic, sizeof(magic), 0) < 0)
		return errno;
	if (st.st_size != (off_t)INFLIGHT_BYTES || magic != INFLIGHT_MAGIC)
		return EPROTO;		/* a supervisor of another version */
	map = mmap(NULL, INFLIGHT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, inflight_fd, 0);
	if (map == MAP_FAILED)
		return errno;
	if (pipe2(pipe_fds, O_CLOEXEC | O_NONBLOCK) < 0) {
		int error = errno;

		munmap(map, INFLIGHT_BYTES);
		return error;
	}
	/* Room for an INTERRUPT of each slot; should that fail, see pass_interrupt(). */
	(void)fcntl(pipe_fds[1], F_SETPIPE_SZ, (int)(INFLIGHT_SLOTS * sizeof(uint64_t)));
	base = map;
	head = map;
	used = (void *)(base + INFLIGHT_USED);
	/* Neither is fatal: one small page for each request, and these at the front always there. */
	(void)madvise(base, INFLIGHT_BYTES, MADV_NOHUGEPAGE);
	(void)mlock(base, INFLIGHT_FIRST_SLOT);
	for (size_t at = 0; at < INFLIGHT_FIRST_SLOT; at += 4096)
		__atomic_fetch_or(&base[at], 0, __ATOMIC_RELAXED);
	session_fd = fuse_fd;
	interrupt_fd = pipe_fds[1];
	head->interrupt_fd = pipe_fds[0];
	take_stock(fuse_fd);
	store(&head->attached, (uint32_t)getpid());
	return 0;
}

/*
 * Runs in the process that the supervisor executed, and again in what that executes (env(1), say,
 * by the daemon's first line); so nothing here is undone or used up by being done twice.
 */
__attribute__((constructor))
static void start(void)
{
	int fuse_fd = descriptor_from("NSFS_FUSE_FD"), inflight_fd = descriptor_from("NSFS_INFLIGHT_FD");
	int error;

	if (fuse_fd < 0 || inflight_fd < 0)
		return;
	error = attach(fuse_fd, inflight_fd);
	if (error)
		fprintf(stderr, "nsfs-interposer: the memfd of requests in flight: %s\n", strerror(error));
}
