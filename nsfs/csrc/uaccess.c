/*
 * nsfs-uaccess - copy_to_user() for those who called syslog(2).
 *
 * Started as root by the daemon, with a SOCK_SEQPACKET socket as descriptor 3 and a memory file as descriptor 4; ends
 * when the socket is closed.  Each request is one caller of a seccomp listener, which is the descriptor sent along: put
 * the bytes that the memory file begins with into its memory, and answer it.
 *
 * It is a process of its own because it may have to wait, in a page fault, for whoever is behind that memory: a swap
 * device, a network, a hostile FUSE daemon.  Then the daemon kills it and starts another.  It keeps nothing.
 *
 * Whose memory it is: /proc/TID/mem is opened, and only then is it asked whether the call still waits.  If it does, its
 * thread has been there all the time, and the memory opened is its own whatever happens next: it may die, and its TID
 * be another's, or execute something else, whereupon that memory is nobody's any more.  (process_vm_writev(2) would
 * look the TID up anew.)  Writing there ignores that a mapping is read-only, so that is looked at first; a
 * caller who makes it so meanwhile spoils its own copy alone.
 *
 * References: seccomp_unotify(2), proc_pid_mem(5), proc_pid_maps(5).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/seccomp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "protocol.h"

#ifndef PROCMAP_QUERY
/* Linux 6.11 */
enum { PROCMAP_QUERY_VMA_WRITABLE = 2, PROCMAP_QUERY_COVERING_OR_NEXT_VMA = 16 };
struct procmap_query {
	uint64_t size, query_flags, query_addr, vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
	uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
	uint64_t vma_name_addr, build_id_addr;
};
#define PROCMAP_QUERY _IOWR('f', 17, struct procmap_query)
#endif

static char chunk[65536];

static int open_of(uint32_t tid, const char *file, int flags)
{
	char path[48];

	snprintf(path, sizeof(path), "/proc/%u/%s", tid, file);
	return open(path, flags | O_CLOEXEC);
}

/* The same by the text, for older kernels. */
static bool has_read_only_by_text(int maps_fd, uint64_t from, uint64_t to)
{
	size_t length = 0;
	ssize_t got;

	while ((got = read(maps_fd, chunk + length, sizeof(chunk) - 1 - length)) > 0) {
		char *line = chunk, *end;

		length += (size_t)got;
		chunk[length] = '\0';
		for (; (end = strchr(line, '\n')); line = end + 1) {
			char *at;
			const uint64_t start = strtoull(line, &at, 16);
			const uint64_t stop = *at == '-' ? strtoull(at + 1, &at, 16) : 0;

			if (start >= to)
				return false;
			/* " rwxp" */
			if (stop > from && (at[0] != ' ' || at[2] != 'w'))
				return true;
		}
		length -= (size_t)(line - chunk);
		memmove(chunk, line, length);
	}
	return got < 0;
}

/* Whether something is mapped there that the thread itself could not write to.  Where nothing is mapped writing
 * fails by itself, unless it is a stack that grows. */
static bool has_read_only(uint32_t tid, uint64_t from, uint64_t to)
{
	struct procmap_query query = {
		.size = sizeof(query), .query_flags = PROCMAP_QUERY_COVERING_OR_NEXT_VMA, .query_addr = from };
	const int maps_fd = open_of(tid, "maps", O_RDONLY);
	bool found = true;

	if (maps_fd < 0)
		return true;
	for (;; query.query_addr = query.vma_end) {
		if (ioctl(maps_fd, PROCMAP_QUERY, &query)) {
			/* ENOENT: nothing more is mapped. */
			found = errno == ENOENT ? false : errno != ENOTTY || has_read_only_by_text(maps_fd, from, to);
			break;
		}
		if (query.vma_start >= to || !(query.vma_flags & PROCMAP_QUERY_VMA_WRITABLE)) {
			found = query.vma_start < to;
			break;
		}
	}
	close(maps_fd);
	return found;
}

/* Copy; 0 or -EFAULT. */
static int put(int mem_fd, uint64_t address, size_t length)
{
	size_t done = 0;

	while (done < length) {
		const size_t wanted = length - done < sizeof(chunk) ? length - done : sizeof(chunk);
		const ssize_t got = pread(UACCESS_DATA_FD, chunk, wanted, (off_t)done);

		if (got <= 0 || pwrite(mem_fd, chunk, (size_t)got, (off_t)(address + done)) != got)
			return -EFAULT;
		done += (size_t)got;
	}
	return 0;
}

/* 0: it has been answered; else -errno. */
static int answer(const struct uaccess_request *request, int listener_fd)
{
	struct seccomp_notif_resp response = { .id = request->id, .val = request->value };
	const int mem_fd = open_of(request->tid, "mem", O_WRONLY);
	int result = -EFAULT;

	if (mem_fd < 0 && errno != ENOENT && errno != ESRCH)
		/* The kernel forbids to look at others' memory (Yama). */
		result = -EPERM;
	else if (mem_fd >= 0 && request->address + request->length > request->address &&
		 !has_read_only(request->tid, request->address, request->address + request->length) &&
		 !ioctl(listener_fd, SECCOMP_IOCTL_NOTIF_ID_VALID, &request->id))
		result = put(mem_fd, request->address, request->length);
	if (mem_fd >= 0)
		close(mem_fd);
	response.error = result;
	if (result)
		response.val = 0;
	if (ioctl(listener_fd, SECCOMP_IOCTL_NOTIF_SEND, &response))
		return -errno;
	return result;
}

int main(void)
{
	(void)prctl(PR_SET_DUMPABLE, 0);
	for (;;) {
		union {
			char buffer[CMSG_SPACE(sizeof(int))];
			struct cmsghdr align;
		} control;
		struct uaccess_request request;
		struct iovec iov = { .iov_base = &request, .iov_len = sizeof(request) };
		struct msghdr header = { .msg_iov = &iov, .msg_iovlen = 1,
			.msg_control = control.buffer, .msg_controllen = sizeof(control.buffer) };
		const ssize_t length = recvmsg(UACCESS_SOCKET_FD, &header, MSG_CMSG_CLOEXEC);
		const struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
		struct uaccess_reply reply;
		int fd;

		if (length < 0 && errno == EINTR)
			continue;
		if (length != sizeof(request) || !rights || rights->cmsg_len != CMSG_LEN(sizeof(fd)))
			return length != 0;
		memcpy(&fd, CMSG_DATA(rights), sizeof(fd));
		reply.error = answer(&request, fd);
		close(fd);
		if (send(UACCESS_SOCKET_FD, &reply, sizeof(reply), MSG_NOSIGNAL) < 0)
			return 1;
	}
}
