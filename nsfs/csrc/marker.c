/* nsfs-marker: reads the host's kernel log and what tells whose a line is, for the daemon.
 *
 *     nsfs-marker [--bpf OBJECT] [--trace INSTANCE]   (one of them, or neither)
 *
 * Standard output is a pipe of frames (struct frame, then `length` bytes): records as /dev/kmsg gives
 * them; events of mark.bpf.c (--bpf); lines of the instance's trace_pipe (--trace).  The log holds
 * some hundreds of lines only, so they are taken at once and kept here while the daemon is busy.
 * Descriptor 3 is a SOCK_SEQPACKET socket: a struct request with a descriptor of a network namespace,
 * a struct reply.  It ends when that socket is closed.
 *
 * It runs as the host's root, is single-threaded and so may change its network namespace; what it
 * reads from the socket comes from the daemon alone.  It is built with libbpf where that is found,
 * without it elsewhere (--bpf then fails with ENOSYS). */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <linux/bpf.h>
#include <linux/if_packet.h>
#include <linux/mount.h>
#include <linux/netlink.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "mark.h"

#if defined(NSFS_LIBBPF) && __has_include(<bpf/libbpf.h>)
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#define HAVE_BPF 1
#else
#define HAVE_BPF 0
#endif

#ifndef SO_NETNS_COOKIE
#define SO_NETNS_COOKIE 71
#endif

enum { COMMAND_FD = 3, KMSG_BYTES = 8192, TRACE_BYTES = 65536 };
/* Linux 6.4; the headers may be older. */
enum { PROG_TYPE_NETFILTER = 32, ATTACH_NETFILTER = 45, HOOKS = 5, FAMILIES = 2 };
enum { QUEUE_MAX = 64 << 20 };

enum { FRAME_READY = 0, FRAME_RECORD = 1, FRAME_EVENT = 2, FRAME_OVERRUN = 3, FRAME_TRACE = 4,
       FRAME_LOST = 5 };

struct frame {
	uint32_t length;
	uint32_t kind;
};

enum { DO_ATTACH = 1, DO_DETACH = 2, DO_DESCRIBE = 3, DO_NFLOG = 4 };

struct request {
	uint32_t what;
	uint32_t hooks; /* DO_ATTACH: LOG rules can print there, so mark at every hook */
	uint64_t cookie;
};

struct reply {
	int32_t error; /* -errno */
	uint32_t pad;
	uint64_t cookie;
	char text[60000];
};

static unsigned char *queue;
static size_t queue_size, queue_head, queue_tail;
static int own_net_fd = -1;

static void fail(const char *what)
{
	fprintf(stderr, "nsfs-marker: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* --- what is on its way to the daemon --- */

static int queue_full(void)
{
	return queue_tail - queue_head > QUEUE_MAX - (1 << 20);
}

static void put(uint32_t kind, const void *data, size_t length)
{
	struct frame frame = { (uint32_t)length, kind };
	size_t need = sizeof frame + length;

	if (queue_tail - queue_head + need > QUEUE_MAX)
		return;
	if (queue_tail + need > queue_size) {
		if (queue_head) {
			memmove(queue, queue + queue_head, queue_tail - queue_head);
			queue_tail -= queue_head;
			queue_head = 0;
		}
		if (queue_tail + need > queue_size) {
			size_t size = (queue_tail + need) * 2;
			unsigned char *grown = realloc(queue, size);

			if (!grown)
				fail("realloc");
			queue = grown;
			queue_size = size;
		}
	}
	memcpy(queue + queue_tail, &frame, sizeof frame);
	if (length)
		memcpy(queue + queue_tail + sizeof frame, data, length);
	queue_tail += need;
}

static void flush(void)
{
	while (queue_tail > queue_head) {
		ssize_t done = write(STDOUT_FILENO, queue + queue_head, queue_tail - queue_head);

		if (done < 0) {
			if (errno == EAGAIN)
				return;
			if (errno == EINTR)
				continue;
			exit(0); /* the daemon is gone */
		}
		queue_head += (size_t)done;
	}
	queue_head = queue_tail = 0;
	if (queue_size > 1 << 20) {
		free(queue);
		queue = NULL;
		queue_size = 0;
	}
}

/* --- the log --- */

static void read_kmsg(int fd)
{
	static char record[KMSG_BYTES];

	while (!queue_full()) {
		ssize_t length = read(fd, record, sizeof record);

		if (length > 0) {
			put(FRAME_RECORD, record, (size_t)length);
		} else if (length < 0 && errno == EPIPE) {
			put(FRAME_OVERRUN, NULL, 0);
		} else if (length < 0 && (errno == EINTR || errno == EINVAL)) {
			continue;
		} else {
			return;
		}
	}
}

/* --- the trace --- */

static int tracefs_fd = -1;
static char instance_name[64];

static void write_at(int dir_fd, const char *name, const char *value)
{
	int fd = openat(dir_fd, name, O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, value, strlen(value)) < 0)
		fail(name);
	close(fd);
}

static void remove_instance(void)
{
	int fd = openat(tracefs_fd, "instances", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0)
		return;
	unlinkat(fd, instance_name, AT_REMOVEDIR);
	close(fd);
}

/* Our own mount of tracefs, attached nowhere: whether and where the host has one does not matter. */
static int open_tracefs(void)
{
	int fs_fd = (int)syscall(SYS_fsopen, "tracefs", FSOPEN_CLOEXEC);
	int mount_fd;

	if (fs_fd < 0)
		fail("fsopen tracefs");
	if (syscall(SYS_fsconfig, fs_fd, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0)
		fail("fsconfig tracefs");
	mount_fd = (int)syscall(SYS_fsmount, fs_fd, FSMOUNT_CLOEXEC, 0);
	if (mount_fd < 0)
		fail("fsmount tracefs");
	close(fs_fd);
	return mount_fd;
}

static int open_trace(const char *name)
{
	int instances_fd, dir_fd, fd;

	if (strlen(name) >= sizeof instance_name || strchr(name, '/') || name[0] == '.') {
		errno = EINVAL;
		fail(name);
	}
	strcpy(instance_name, name);
	tracefs_fd = open_tracefs();
	remove_instance(); /* of one that was killed */
	instances_fd = openat(tracefs_fd, "instances", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (instances_fd < 0 || mkdirat(instances_fd, name, 0700) < 0)
		fail("trace instance");
	dir_fd = openat(instances_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	close(instances_fd);
	if (dir_fd < 0)
		fail("trace instance");
	write_at(dir_fd, "trace_clock", "mono");
	write_at(dir_fd, "buffer_size_kb", "4096");
	/* Readers wake at the first line, not when half of the buffer is full. */
	write_at(dir_fd, "buffer_percent", "0");
	write_at(dir_fd, "events/printk/console/enable", "1");
	fd = openat(dir_fd, "trace_pipe", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0)
		fail("trace_pipe");
	close(dir_fd);
	return fd;
}

static void read_trace(int fd)
{
	static char text[TRACE_BYTES];

	while (!queue_full()) {
		ssize_t length = read(fd, text, sizeof text);

		if (length < 0 && errno == EINTR)
			continue;
		if (length <= 0)
			return;
		put(FRAME_TRACE, text, (size_t)length);
	}
}

/* --- BPF --- */

#if HAVE_BPF

struct attached {
	struct attached *next;
	uint64_t cookie;
	size_t links;
	int link_fds[HOOKS * FAMILIES];
};

static struct attached *attachments;
static struct bpf_object *object;
static struct ring_buffer *ring;
static int hook_fd = -1, nets_fd = -1;
static const volatile uint64_t *lost;
static uint64_t lost_told;

static int on_event(void *context, void *data, size_t size)
{
	static unsigned char trimmed[sizeof(struct event)];
	const struct event *event = data;
	size_t head = offsetof(struct event, marks), marks;

	(void)context;
	if (size < head || event->marks_used > MARKS || event->length > TEXT_BYTES)
		return 0;
	marks = event->marks_used * sizeof event->marks[0];
	memcpy(trimmed, event, head + marks);
	if (event->kind == EVENT_LINE)
		memcpy(trimmed + head + marks, event->text, event->length);
	else if (event->length)
		return 0;
	put(FRAME_EVENT, trimmed, head + marks + event->length);
	return 0;
}

static int quiet(enum libbpf_print_level level, const char *format, va_list arguments)
{
	return level == LIBBPF_WARN ? vfprintf(stderr, format, arguments) : 0;
}

static void open_bpf(const char *path)
{
	struct bpf_program *program;
	struct bpf_map *map;

	libbpf_set_print(quiet);
	object = bpf_object__open_file(path, NULL);
	if (!object)
		fail(path);
	program = bpf_object__find_program_by_name(object, "mark_hook");
	if (!program)
		fail("mark_hook");
	/* libbpf before 1.3 does not know the type. */
	bpf_program__set_type(program, (enum bpf_prog_type)PROG_TYPE_NETFILTER);
	bpf_program__set_expected_attach_type(program, (enum bpf_attach_type)ATTACH_NETFILTER);
	if (bpf_object__load(object))
		fail("the BPF program is not accepted");
	hook_fd = bpf_program__fd(program);
	nets_fd = bpf_object__find_map_fd_by_name(object, "nets");
	map = bpf_object__find_map_by_name(object, "events");
	ring = map ? ring_buffer__new(bpf_map__fd(map), on_event, NULL, NULL) : NULL;
	if (!ring)
		fail("ring buffer");
	bpf_object__for_each_program(program, object) {
		if (bpf_program__fd(program) != hook_fd && !bpf_program__attach(program))
			fail(bpf_program__name(program));
	}
}

static int ring_fd(void)
{
	return ring_buffer__epoll_fd(ring);
}

static void read_ring(void)
{
	if (!queue_full())
		ring_buffer__consume(ring);
}

/* The system call itself: libbpf before 1.3 has no call for this kind of link. */
static int link_hook(uint32_t family, uint32_t hook)
{
	struct {
		uint32_t prog_fd, target_fd, attach_type, flags;
		uint32_t pf, hooknum;
		int32_t priority;
		uint32_t link_flags;
		uint64_t rest[8];
	} attr;

	memset(&attr, 0, sizeof attr);
	attr.prog_fd = (uint32_t)hook_fd;
	attr.attach_type = ATTACH_NETFILTER;
	attr.pf = family;
	attr.hooknum = hook;
	attr.priority = INT32_MIN + 1; /* INT32_MIN is not given out */
	return (int)syscall(SYS_bpf, BPF_LINK_CREATE, &attr, sizeof attr);
}

static void drop(struct attached *each)
{
	for (size_t i = 0; i < each->links; i++)
		close(each->link_fds[i]);
	free(each);
}

/* In the namespace meant. */
static int attach_here(uint64_t cookie, int hooks)
{
	struct attached *each = calloc(1, sizeof *each);
	static const uint32_t families[FAMILIES] = { 2, 10 }; /* NFPROTO_IPV4, NFPROTO_IPV6 */
	uint32_t value = 1;

	if (!each)
		return -ENOMEM;
	each->cookie = cookie;
	for (uint32_t i = 0; hooks && i < HOOKS * FAMILIES; i++) {
		int fd = link_hook(families[i / HOOKS], i % HOOKS);

		if (fd < 0) {
			int error = -errno;

			drop(each);
			return error;
		}
		each->link_fds[each->links++] = fd;
	}
	if (bpf_map_update_elem(nets_fd, &cookie, &value, BPF_ANY)) {
		int error = -errno;

		drop(each);
		return error;
	}
	each->next = attachments;
	attachments = each;
	return 0;
}

static int detach(uint64_t cookie)
{
	for (struct attached **at = &attachments; *at; at = &(*at)->next) {
		struct attached *each = *at;

		if (each->cookie != cookie)
			continue;
		bpf_map_delete_elem(nets_fd, &cookie);
		*at = each->next;
		drop(each);
		return 0;
	}
	return -ENOENT;
}

static void find_lost(void)
{
	struct bpf_map *map = object ? bpf_object__find_map_by_name(object, ".bss") : NULL;
	size_t size = 0;

	if (!map)
		return;
	/* Mapped by libbpf at load; its first and only word is the counter. */
	lost = bpf_map__initial_value(map, &size);
	if (size < sizeof *lost)
		lost = NULL;
}

static void tell_lost(void)
{
	if (lost && *lost != lost_told) {
		uint64_t count = *lost - lost_told;

		lost_told += count;
		put(FRAME_LOST, &count, sizeof count);
	}
}

#else

static void open_bpf(const char *path)
{
	errno = ENOSYS;
	fail(path);
}
static int ring_fd(void) { return -1; }
static void read_ring(void) {}
static int attach_here(uint64_t cookie, int hooks)
{
	(void)cookie;
	(void)hooks;
	return -EOPNOTSUPP;
}
static int detach(uint64_t cookie) { (void)cookie; return -EOPNOTSUPP; }
static void find_lost(void) {}
static void tell_lost(void) {}

#endif

/* --- requests --- */

static uint64_t cookie_here(void)
{
	uint64_t cookie = 0;
	socklen_t length = sizeof cookie;
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return 0;
	if (getsockopt(fd, SOL_SOCKET, SO_NETNS_COOKIE, &cookie, &length))
		cookie = 0;
	close(fd);
	return cookie;
}

/* The interfaces of the namespace that we are in: lines "link NAME MAC", "index NAME NUMBER" and
 * "addr NAME ADDRESS". */
static int describe_here(struct reply *reply)
{
	struct ifaddrs *all, *each;
	size_t used = 0;

	if (getifaddrs(&all))
		return -errno;
	for (each = all; each; each = each->ifa_next) {
		char text[128] = "";
		size_t length;

		if (!each->ifa_addr)
			continue;
		if (each->ifa_addr->sa_family == AF_PACKET) {
			const struct sockaddr_ll *link = (const void *)each->ifa_addr;
			const unsigned char *mac = link->sll_addr;

			snprintf(text, sizeof text,
				 "link %s %02x:%02x:%02x:%02x:%02x:%02x\nindex %s %d\n",
				 each->ifa_name, mac[0], mac[1], mac[2], mac[3], mac[4], mac[5],
				 each->ifa_name, link->sll_ifindex);
		} else if (each->ifa_addr->sa_family == AF_INET) {
			const struct sockaddr_in *in = (const void *)each->ifa_addr;
			char address[INET_ADDRSTRLEN];

			if (inet_ntop(AF_INET, &in->sin_addr, address, sizeof address))
				snprintf(text, sizeof text, "addr %s %s\n", each->ifa_name, address);
		} else if (each->ifa_addr->sa_family == AF_INET6) {
			const struct sockaddr_in6 *in6 = (const void *)each->ifa_addr;
			char address[INET6_ADDRSTRLEN];

			if (inet_ntop(AF_INET6, &in6->sin6_addr, address, sizeof address))
				snprintf(text, sizeof text, "addr %s %s\n", each->ifa_name, address);
		}
		length = strlen(text);
		if (used + length + 1 > sizeof reply->text) {
			freeifaddrs(all);
			return -E2BIG;
		}
		memcpy(reply->text + used, text, length + 1);
		used += length;
	}
	freeifaddrs(all);
	return 0;
}

/* `*socket_fd` becomes one that is to be handed over. */
static int act(const struct request *request, int net_fd, struct reply *reply, int *socket_fd)
{
	int result;

	if (request->what == DO_DETACH)
		return detach(request->cookie);
	if (net_fd < 0)
		return -EINVAL;
	if (setns(net_fd, CLONE_NEWNET))
		return -errno;
	reply->cookie = cookie_here();
	switch (request->what) {
	case DO_ATTACH:
		result = reply->cookie ? attach_here(reply->cookie, request->hooks != 0) : -EOPNOTSUPP;
		break;
	case DO_DESCRIBE:
		result = describe_here(reply);
		break;
	case DO_NFLOG:
		*socket_fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK,
				    NETLINK_NETFILTER);
		result = *socket_fd < 0 ? -errno : 0;
		break;
	default:
		result = -EINVAL;
	}
	/* Not to be anywhere else than where we believe to be. */
	if (setns(own_net_fd, CLONE_NEWNET))
		fail("setns back");
	return result;
}

/* 0 when the daemon is gone. */
static int answer(void)
{
	static struct reply reply;
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control;
	struct request request;
	struct iovec part = { &request, sizeof request };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof control };
	struct cmsghdr *header;
	int net_fd = -1, socket_fd = -1;
	ssize_t length = recvmsg(COMMAND_FD, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);

	if (length < 0)
		return errno == EAGAIN || errno == EINTR;
	if (length == 0)
		return 0;
	header = CMSG_FIRSTHDR(&message);
	if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS &&
	    header->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(&net_fd, CMSG_DATA(header), sizeof net_fd);
	memset(&reply, 0, offsetof(struct reply, text) + 1);
	reply.error = length == sizeof request ? act(&request, net_fd, &reply, &socket_fd) : -EINVAL;
	if (net_fd >= 0)
		close(net_fd);

	part.iov_base = &reply;
	part.iov_len = offsetof(struct reply, text) + strlen(reply.text);
	memset(&message, 0, sizeof message);
	message.msg_iov = &part;
	message.msg_iovlen = 1;
	if (socket_fd >= 0) {
		memset(&control, 0, sizeof control);
		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(&control.header), &socket_fd, sizeof socket_fd);
		message.msg_control = &control;
		message.msg_controllen = sizeof control;
	}
	length = sendmsg(COMMAND_FD, &message, MSG_NOSIGNAL);
	if (socket_fd >= 0)
		close(socket_fd);
	return length >= 0;
}

int main(int argc, char **argv)
{
	struct rlimit files = { 1 << 20, 1 << 20 };
	int kmsg_fd, trace_fd = -1, bpf = 0;
	unsigned char tier = 0;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGPIPE, SIG_IGN);
	/* Of the terminal and of the service: the closed socket ends us, after the daemon. */
	signal(SIGINT, SIG_IGN);
	signal(SIGTERM, SIG_IGN);
	signal(SIGHUP, SIG_IGN);
	fcntl(COMMAND_FD, F_SETFD, FD_CLOEXEC);
	/* Ten links for each namespace. */
	if (setrlimit(RLIMIT_NOFILE, &files) && !getrlimit(RLIMIT_NOFILE, &files)) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
	own_net_fd = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
	if (own_net_fd < 0)
		fail("/proc/self/ns/net");
	kmsg_fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (kmsg_fd < 0)
		fail("/dev/kmsg");
	if (argc == 3 && !strcmp(argv[1], "--bpf")) {
		open_bpf(argv[2]);
		find_lost();
		bpf = 1;
		tier = 2;
	} else if (argc == 3 && !strcmp(argv[1], "--trace")) {
		trace_fd = open_trace(argv[2]);
		tier = 1;
	} else if (argc != 1) {
		errno = EINVAL;
		fail("arguments");
	}
	if (fcntl(STDOUT_FILENO, F_SETFL, O_NONBLOCK) < 0)
		fail("standard output");
	put(FRAME_READY, &tier, 1);

	for (;;) {
		struct pollfd fds[] = {
			{ .fd = COMMAND_FD, .events = POLLIN },
			{ .fd = queue_full() ? -1 : kmsg_fd, .events = POLLIN },
			{ .fd = queue_full() ? -1 : (bpf ? ring_fd() : trace_fd), .events = POLLIN },
			{ .fd = queue_tail > queue_head ? STDOUT_FILENO : -1, .events = POLLOUT },
		};

		if (poll(fds, 4, -1) < 0 && errno != EINTR)
			fail("poll");
		/* What tells whose a line is, before the line. */
		if (bpf) {
			read_ring();
			tell_lost();
		} else if (trace_fd >= 0) {
			read_trace(trace_fd);
		}
		if (fds[1].revents)
			read_kmsg(kmsg_fd);
		if (fds[0].revents && !answer())
			break;
		flush();
	}
	if (trace_fd >= 0) {
		close(trace_fd);
		remove_instance();
	}
	return 0;
}
