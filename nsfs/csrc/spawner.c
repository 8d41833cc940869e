/*
 * nsfs-spawner - makes containers, and acts in the namespaces of others.
 *
 *   nsfs-spawner --tree DIR [--no-filter]
 *
 * DIR is where the filesystem is mounted.  Without a filter, containers are made without the denylist of system
 * calls; it cannot be taken off again, so these want a spawner of their own.
 *
 * Started as root by the daemon, with a SOCK_SEQPACKET socket as descriptor 3 (protocol.h); ends when
 * that is closed.  One thread, so setns(2) works; several requests may be under way at once, since whatever
 * could be slow runs in a child.
 *
 * It lives in a mount namespace of its own which has nothing but templates:
 *   /root        the host's root filesystem alone: read-only, nosuid, nodev, and idmapped by a user namespace
 *                that maps no ID of the host.  So no file counts as anybody's: all is read as `other`, and
 *                since nobody may write to an inode without an owner no socket can be connected to either.
 *                Empty directories are mounted over those that containers have of their own: being copied
 *                locks them there, so that what is below is not laid open by umount(2) or another bind.
 *   /fuse        the filesystem; nothing in it is looked at before the daemon asks for something
 *   /dev, /proc, /sys   to bind from, and because a user namespace may mount only what it can already see
 *   /s           while a container is being cloned: the trees that it shall have
 * A new container's mount namespace is a copy of these few.  Copying into another user namespace is
 * also what locks flags like read-only (MNT_LOCK_READONLY): a tree handed over later could be remounted
 * by the container's root.
 *
 * A container is cloned with all its namespaces, its init in the cgroup ID/init, and mounts what it needs in the
 * copy; then it executes nsfs-init, which says when it is ready.  Not dumpable, and its memory belongs to the initial
 * user namespace: until then nobody inside or in the parent can trace it either.
 *
 * References: namespaces(7), user_namespaces(7), mount_namespaces(7), clone(2), open_tree(2), move_mount(2),
 * mount_setattr(2), pivot_root(2), seccomp(2), capabilities(7).
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/mount.h>
#include <linux/nsfs.h>
#include <linux/openat2.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "protocol.h"

#ifndef __NR_open_tree_attr
#define __NR_open_tree_attr 467
#endif
/* <sys/mount.h> cannot be had together with <linux/mount.h> in glibc 2.36. */
#ifndef MNT_FORCE
#define MNT_FORCE 1
#define MNT_DETACH 2
#define UMOUNT_NOFOLLOW 8
#endif

#define N(array) (sizeof(array) / sizeof((array)[0]))
#define JOBS_MAX 128
#define DEADLINE_MS 30000	/* a child that takes longer hangs in somebody's filesystem */
#define END_MS 200		/* who is killed and takes longer to go cannot: it waits for such a filesystem */
#define FIRST_FD 20		/* ours are from here on; below is where an init wants its own */
#define KEPT_MAX 64		/* more than are opened at the start */
#define NOBODY 0xfffffffeU	/* an ID that no file has */
#define SYS_ENTRIES_MAX 32
#define JOINS_MAX 5

enum { OWN_ALL = CLONE_NEWCGROUP | CLONE_NEWIPC | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID |
	CLONE_NEWTIME | CLONE_NEWUSER | CLONE_NEWUTS };

/* What can be another's than the parent's: what no other follows from. */
enum { JOINED = CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWTIME | CLONE_NEWUTS };

/* A request, taken apart. */
struct request {
	struct spawner_request head;
	struct map_extent extents[2 * MAP_EXTENTS_MAX];
	const char *strings[BINDS_MAX + 2];
	int fds[MESSAGE_FDS_MAX];
	size_t fd_count;
	/* OP_MAKE: which is which */
	int listen_fd, init_cgroup_fd, payload_fd, rootfs_fd;
	const int *v1_fds, *bind_fds, *join_fds;
	unsigned int joined;	/* CLONE_NEW* of join_fds */
};

/* A child at work. */
struct job {
	bool busy;
	int pid;		/* OP_MAKE: the host's, of the container's init; 0: it comes with the result */
	int pid_fd;
	int channel_fd;		/* from it comes a struct init_result, or a struct made */
	uint64_t id;
	uint32_t op;
	int64_t deadline_ms;
};

/* What a container is told and given while it is mounting; each message is one such byte and descriptors. */
enum { MAPPED = 'm', NAMESPACES = 'n', FACE = 'f' };
enum { GIVEN_CGROUP_NS, GIVEN_NET_NS, GIVEN_NAMESPACES };
enum { GIVEN_FACE, GIVEN_KMSG, GIVEN_PROC_KMSG, GIVEN_FACES };
#define SENT_FDS_MAX 3

/* What a child that makes a container says of it. */
struct made {
	struct init_result result;
	int32_t pid;
};

/* What a child with our descriptors leaves behind; in memory shared with it. */
struct left {
	int value;		/* a descriptor or -errno */
	uint32_t step;
};

static int socket_fd = -1, root_fd = -1, proc_fd = -1, signal_fd = -1;
static int host_mnt_fd = -1, own_mnt_fd = -1, own_uts_fd = -1, nobody_fd = -1;
static bool filtered;	/* we have the denylist, and so has who descends from us */
static int fuse_fd = -1, faces_fd = -1;
static int kept_fds = FIRST_FD;	/* those below were opened at the start, for good; later ones see sweep() */
static uint32_t features;
static struct job jobs[JOBS_MAX];
static struct request request;
static char message[SPAWNER_MESSAGE_MAX];
static struct left *left;
static char sys_entries[SYS_ENTRIES_MAX][32];
static size_t sys_entry_count;
static ino_t own_user_ino, host_mnt_ino;

/* What is being done: goes with the errno when it fails. */
static uint32_t step;

/* --- system calls that C libraries lack, or have only since recently --- */

static long call(long result)
{
	return result < 0 ? -errno : result;
}

static int open_tree(int dir_fd, const char *path, unsigned int flags)
{
	return (int)call(syscall(SYS_open_tree, dir_fd, path, flags | OPEN_TREE_CLOEXEC));
}

static int clone_tree(int dir_fd, const char *path)
{
	return open_tree(dir_fd, path, OPEN_TREE_CLONE | (*path ? 0 : AT_EMPTY_PATH));
}

/* Attach a tree; `path` is not followed if it is a symbolic link.  Without a path: on dir_fd itself. */
static int attach(int tree_fd, int dir_fd, const char *path)
{
	return (int)call(syscall(SYS_move_mount, tree_fd, "", dir_fd, path,
				 MOVE_MOUNT_F_EMPTY_PATH | (*path ? 0 : MOVE_MOUNT_T_EMPTY_PATH)));
}

static int set_mount(int fd, uint64_t attributes, int userns_fd, bool recursive)
{
	struct mount_attr attr = {
		.attr_set = attributes, .userns_fd = (uint64_t)(unsigned int)userns_fd };

	return (int)call(syscall(SYS_mount_setattr, fd, "", AT_EMPTY_PATH | (recursive ? AT_RECURSIVE : 0),
				 &attr, sizeof(attr)));
}

static int set_propagation(int fd, uint64_t propagation)
{
	struct mount_attr attr = { .propagation = propagation };

	return (int)call(syscall(SYS_mount_setattr, fd, "", AT_EMPTY_PATH | AT_RECURSIVE, &attr, sizeof(attr)));
}

/* A clone of a shared mount is its peer: what is mounted in one is seen in the other, both ways.  At most one way. */
static int confine(int tree_fd, uint32_t flags)
{
	return set_propagation(tree_fd, flags & FLAG_SLAVE ? MS_SLAVE : MS_PRIVATE);
}

static int bind_path(const char *source, const char *target, unsigned long flags)
{
	return (int)call(syscall(SYS_mount, source, target, NULL, MS_BIND | flags, NULL));
}

static int detach(const char *path)
{
	return (int)call(syscall(SYS_umount2, path, MNT_DETACH | UMOUNT_NOFOLLOW));
}

/* A new instance of a filesystem, as a detached mount; options: pairs of key and value, or NULL for a flag. */
static int new_mount(const char *type, const char *const (*options)[2], unsigned int attributes)
{
	int fs_fd = (int)call(syscall(SYS_fsopen, type, 1 /* FSOPEN_CLOEXEC */)), result = 0;

	if (fs_fd < 0)
		return fs_fd;
	for (; options && (*options)[0] && result >= 0; options++)
		result = (int)call(syscall(SYS_fsconfig, fs_fd,
					   (*options)[1] ? FSCONFIG_SET_STRING : FSCONFIG_SET_FLAG,
					   (*options)[0], (*options)[1], 0));
	if (result >= 0)
		result = (int)call(syscall(SYS_fsconfig, fs_fd, FSCONFIG_CMD_CREATE, NULL, NULL, 0));
	if (result >= 0)
		result = (int)call(syscall(SYS_fsmount, fs_fd, 1 /* FSMOUNT_CLOEXEC */, attributes));
	close(fs_fd);
	return result;
}

static int open_in_root(int dir_fd, const char *path, uint64_t flags)
{
	struct open_how how = { .flags = flags | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT };

	return (int)call(syscall(SYS_openat2, dir_fd, path, &how, sizeof(how)));
}

/* Returns 0 in the child, else its PID or -errno.  With pid_fd the parent gets a pidfd and the child signals its end. */
static int clone_child(uint64_t flags, int cgroup_fd, int *pid_fd)
{
	struct clone_args args = {
		.flags = flags | (cgroup_fd >= 0 ? CLONE_INTO_CGROUP : 0) | (pid_fd ? CLONE_PIDFD : 0),
		.exit_signal = pid_fd ? SIGCHLD : 0,
		.cgroup = (uint64_t)(unsigned int)cgroup_fd,
		.pidfd = (uint64_t)(uintptr_t)pid_fd,
	};

	return (int)call(syscall(SYS_clone3, &args, sizeof(args)));
}

/* Raw, since a C library's would look for other threads; -1 leaves an ID as it is. */
static int set_ids(long real, long effective, long saved, bool groups)
{
	return (int)call(syscall(groups ? SYS_setresgid : SYS_setresuid, real, effective, saved));
}

/* --- small things --- */

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int write_file(int dir_fd, const char *path, const char *text, size_t length)
{
	int fd = openat(dir_fd, path, O_WRONLY | O_CLOEXEC), result = 0;

	if (fd < 0)
		return -errno;
	if (write(fd, text, length) != (ssize_t)length)
		result = errno ? -errno : -EIO;
	close(fd);
	return result;
}

/* Kill it if it lives and see it gone, also if somebody else is to reap it; or leave it to that after so long. */
static void end_within(int pid_fd, int limit_ms)
{
	struct pollfd polled = { .fd = pid_fd, .events = POLLIN };
	siginfo_t unused;
	int ready;

	(void)syscall(SYS_pidfd_send_signal, pid_fd, SIGKILL, NULL, 0);
	do
		ready = poll(&polled, 1, limit_ms);
	while (ready < 0);
	if (ready)
		(void)waitid(P_PIDFD, (id_t)pid_fd, &unused, WEXITED | __WALL);
	close(pid_fd);
}

static void end(int pid_fd)
{
	end_within(pid_fd, -1);
}

/* Whom a pidfd means, by the number that our /proc has for it. */
static int pid_of(int pid_fd)
{
	char path[48], text[256];
	const char *line;
	ssize_t length;
	int fd;

	snprintf(path, sizeof(path), "self/fdinfo/%d", pid_fd);
	fd = (int)call(openat(proc_fd, path, O_RDONLY | O_CLOEXEC));
	if (fd < 0)
		return fd;
	length = read(fd, text, sizeof(text) - 1);
	close(fd);
	text[length > 0 ? length : 0] = '\0';
	line = strstr(text, "\nPid:");
	/* -1: it is dead. */
	return line && atoi(line + 5) > 0 ? atoi(line + 5) : -ESRCH;
}

/* A packet, with those of the descriptors that are not -1. */
static int send_with(int to_fd, void *data, size_t length, const int *fds, size_t fd_count)
{
	union {
		char buffer[CMSG_SPACE(sizeof(int) * SENT_FDS_MAX)];
		struct cmsghdr align;
	} control = { .buffer = "" };
	struct iovec iov = { .iov_base = data, .iov_len = length };
	struct msghdr header = { .msg_iov = &iov, .msg_iovlen = 1 };
	struct cmsghdr *rights = &control.align;
	size_t count = 0;

	for (size_t i = 0; i < fd_count; i++)
		if (fds[i] >= 0)
			memcpy(CMSG_DATA(rights) + sizeof(int) * count++, &fds[i], sizeof(int));
	if (count) {
		header.msg_control = control.buffer;
		header.msg_controllen = CMSG_SPACE(sizeof(int) * count);
		rights->cmsg_level = SOL_SOCKET;
		rights->cmsg_type = SCM_RIGHTS;
		rights->cmsg_len = CMSG_LEN(sizeof(int) * count);
	}
	return sendmsg(to_fd, &header, MSG_NOSIGNAL) < 0 ? -errno : 0;
}

/* Receive a packet into `data` and descriptors into fds[]; returns its length or -errno. */
static ssize_t receive_with(int from_fd, int flags, void *data, size_t size,
			    int *fds, size_t fds_size, size_t *fd_count)
{
	union {
		char buffer[CMSG_SPACE(sizeof(int) * MESSAGE_FDS_MAX)];
		struct cmsghdr align;
	} control;
	struct iovec iov = { .iov_base = data, .iov_len = size };
	struct msghdr header = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control.buffer, .msg_controllen = CMSG_SPACE(sizeof(int) * fds_size),
	};
	const struct cmsghdr *rights;
	ssize_t length = recvmsg(from_fd, &header, MSG_CMSG_CLOEXEC | flags);

	*fd_count = 0;
	if (length < 0)
		return -errno;
	rights = CMSG_FIRSTHDR(&header);
	if (rights && rights->cmsg_level == SOL_SOCKET && rights->cmsg_type == SCM_RIGHTS) {
		*fd_count = (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		/* The buffer may have had room for one more, by its padding. */
		while (*fd_count > fds_size) {
			int extra;

			memcpy(&extra, CMSG_DATA(rights) + sizeof(int) * --*fd_count, sizeof(int));
			close(extra);
			header.msg_flags |= MSG_CTRUNC;
		}
		memcpy(fds, CMSG_DATA(rights), *fd_count * sizeof(int));
	}
	return header.msg_flags & (MSG_TRUNC | MSG_CTRUNC) ? -E2BIG : length;
}

/* /proc/PID/ns/TYPE; 0: our own */
static int open_ns(pid_t pid, const char *type)
{
	char path[64];

	if (pid)
		snprintf(path, sizeof(path), "%d/ns/%s", (int)pid, type);
	else
		snprintf(path, sizeof(path), "self/ns/%s", type);
	return (int)call(openat(proc_fd, path, O_RDONLY | O_CLOEXEC));
}

static ino_t ns_ino(pid_t pid, const char *type)
{
	struct stat st;
	char path[64];

	snprintf(path, sizeof(path), "%d/ns/%s", (int)pid, type);
	return fstatat(proc_fd, path, &st, 0) ? 0 : st.st_ino;
}

static int open_pid(pid_t pid)
{
	int fd = (int)call(syscall(SYS_pidfd_open, pid, 0));

	step = STEP_PROCESS;
	return fd == -EINVAL ? -ESRCH : fd;
}

/* Write the maps of a process's new user namespace.  To be called in the parent user namespace. */
static int write_maps(int pid)
{
	static char text[MAP_EXTENTS_MAX * 36];
	const struct map_extent *extent = request.extents;
	static const char *const files[] = { "uid_map", "gid_map" };
	const uint32_t counts[] = { request.head.uid_extents, request.head.gid_extents };
	char path[64];

	step = STEP_MAP;
	for (int i = 0; i < 2; i++) {
		size_t length = 0;
		int result;

		for (uint32_t n = 0; n < counts[i]; n++, extent++)
			length += (size_t)snprintf(text + length, sizeof(text) - length, "%u %u %u\n",
						   extent->inside, extent->outside, extent->count);
		snprintf(path, sizeof(path), "%d/%s", pid, files[i]);
		result = length ? write_file(proc_fd, path, text, length) : 0;
		if (result)
			return result;
	}
	return 0;
}

/* Whether the container's map has this ID inside. */
static bool gid_mapped(uint32_t id)
{
	const struct map_extent *extent = request.extents + request.head.uid_extents;

	if (!(request.head.unshare & CLONE_NEWUSER))
		return true;
	for (uint32_t n = 0; n < request.head.gid_extents; n++, extent++)
		if (id >= extent->inside && id - extent->inside < extent->count)
			return true;
	return false;
}

/* --- the child: from clone3 to exec --- */

static int make_dir(int dir_fd, const char *path, mode_t mode)
{
	return (int)call(mkdirat(dir_fd, path, mode));
}

static int make_file(int dir_fd, const char *path)
{
	return (int)call(mknodat(dir_fd, path, S_IFREG | 0644, 0));
}

/* The file or directory on which something shall be mounted, made where that is possible.  The root may be
 * hostile: nothing leads out of it. */
static int open_target(int dir_fd, const char *path, bool directory)
{
	int fd = open_in_root(dir_fd, path, O_PATH), parent_fd, result;
	char part[4096];
	size_t length = strlen(path);

	if (fd != -ENOENT)
		return fd;
	if (length >= sizeof(part))
		return -ENAMETOOLONG;
	for (size_t at = 1; at <= length; at++) {
		const char *name;

		if ((path[at] != '/' && path[at]) || path[at - 1] == '/')
			continue;
		memcpy(part, path, at);
		part[at] = '\0';
		fd = open_in_root(dir_fd, part, O_PATH);
		if (fd >= 0) {
			close(fd);
			continue;
		}
		if (fd != -ENOENT)
			return fd;
		name = strrchr(part, '/');
		name = name ? name + 1 : part;
		part[name - part ? name - part - 1 : 0] = '\0';
		parent_fd = open_in_root(dir_fd, *part ? part : ".", O_PATH | O_DIRECTORY);
		if (parent_fd < 0)
			return parent_fd;
		memcpy(part, path, at);
		part[at] = '\0';
		result = path[at] || directory ? make_dir(parent_fd, name, 0755) : make_file(parent_fd, name);
		close(parent_fd);
		if (result < 0 && result != -EEXIST)
			return result;
	}
	return open_in_root(dir_fd, path, O_PATH);
}

static bool own(int type)
{
	return request.head.unshare & (unsigned int)type;
}

/* Whether a namespace is another container's, not the host's. */
static bool inherited(int type)
{
	return !own(type) && (request.head.pid || request.joined & (unsigned int)type);
}

static int given_namespaces[GIVEN_NAMESPACES] = { -1, -1 }, given_faces[GIVEN_FACES] = { -1, -1, -1 };

/* Wait until the spawner has sent so many messages, in whatever order. */
static void hear_spawner(int channel_fd, int messages)
{
	int fds[SENT_FDS_MAX];
	size_t count, next;
	char kind;

	while (messages--) {
		/* When it has died, or failed, there is nothing more to do. */
		if (receive_with(channel_fd, 0, &kind, 1, fds, N(fds), &count) != 1)
			_exit(1);
		next = 0;
		if (kind == NAMESPACES && own(CLONE_NEWCGROUP) && next < count)
			given_namespaces[GIVEN_CGROUP_NS] = fds[next++];
		if (kind == NAMESPACES && own(CLONE_NEWNET) && next < count)
			given_namespaces[GIVEN_NET_NS] = fds[next++];
		if (kind == FACE && count == GIVEN_FACES)
			memcpy(given_faces, fds, sizeof(given_faces));
	}
}

/* Wait for the namespaces that are made in the meantime and for the files of the mount. */
static int take_given(int channel_fd)
{
	hear_spawner(channel_fd, (own(CLONE_NEWCGROUP) || own(CLONE_NEWNET)) + own(CLONE_NEWNS));
	step = STEP_NET;
	return own(CLONE_NEWNET) ?
		(int)call(setns(given_namespaces[GIVEN_NET_NS], CLONE_NEWNET)) : 0;
}

static int become_root(void)
{
	int result;

	step = STEP_IDENTITY;
	if (!own(CLONE_NEWUSER) && (result = (int)call(prctl(PR_SET_SECUREBITS, 0, 0, 0, 0))))
		return result;
	if ((result = set_ids(0, 0, 0, true)) || (result = set_ids(0, 0, 0, false)))
		return result;
	/* A change of credentials sets it to fs.suid_dumpable, which may be 1. */
	return (int)call(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0));
}

static const char *const devices[] = { "null", "zero", "full", "random", "urandom", "tty" };
static const char *const private_dirs[] = { "var", "srv", "mnt", "home", "root", "tmp", "run" };
static const char *const device_links[][2] = {
	{ "/proc/self/fd", "fd" }, { "/proc/self/fd/0", "stdin" }, { "/proc/self/fd/1", "stdout" },
	{ "/proc/self/fd/2", "stderr" }, { "pts/ptmx", "ptmx" }, { "/proc/kcore", "core" },
};

/* Mount the tree at a directory of the root; a root that lacks it and cannot be written to goes without. */
static int attach_in_root(int tree_fd, int top_fd, const char *name)
{
	int result = attach(tree_fd, top_fd, name);
	struct stat st;

	if (!result)
		return 0;
	if (result == -ENOENT)
		return make_dir(top_fd, name, 0755) ? 0 : attach(tree_fd, top_fd, name);
	/* Where /home is a link into /var, as with ostree, it leads to what is private anyway. */
	if (!fstatat(top_fd, name, &st, AT_SYMLINK_NOFOLLOW) && S_ISLNK(st.st_mode))
		return 0;
	return result;
}

/* The private, empty directories, all of one tmpfs, at /t for the time being; nothing of it is attached yet. */
static int make_private(void)
{
	static const char *const options[][2] = { { "mode", "0755" }, { NULL, NULL } };
	static const struct { const char *path; mode_t mode; } below[] = {
		{ "dev", 0755 }, { "sys", 0755 }, { "var", 0755 }, { "srv", 0755 }, { "mnt", 0755 },
		{ "home", 0755 }, { "root", 0700 }, { "run", 0755 }, { "tmp", 01777 },
		{ "run/lock", 01777 }, { "var/cache", 0755 }, { "var/lib", 0755 }, { "var/log", 0755 },
		{ "var/tmp", 01777 }, { "dev/.nsfs", 0755 }, { "dev/.nsfs/proc", 0755 },
		{ "dev/.nsfs/sys", 0755 }, { "dev/mqueue", 01777 }, { "dev/pts", 0755 },
		{ "dev/shm", 01777 },
	};
	const size_t only_dev = request.head.flags & FLAG_ROOTFS;
	int fd, result;

	step = STEP_MOUNT;
	fd = new_mount("tmpfs", options, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
	if (fd < 0)
		return fd;
	if ((result = attach(fd, AT_FDCWD, "/t")))
		return result;
	umask(0);
	for (size_t i = 0; i < N(below); i++) {
		if (only_dev && strncmp(below[i].path, "dev", 3) && strncmp(below[i].path, "sys", 3))
			continue;
		if ((result = make_dir(fd, below[i].path, below[i].mode)))
			return result;
	}
	umask(022);
	if (!only_dev && (symlinkat("../run", fd, "var/run") || symlinkat("../run/lock", fd, "var/lock")))
		return -errno;
	return fd;
}

static int set_up_dev(int private_fd, int top_fd, int pts_fd, int queue_fd)
{
	int dev_fd, result;

	step = STEP_MOUNT;
	dev_fd = clone_tree(private_fd, "dev");
	if (dev_fd < 0)
		return dev_fd;
	if ((result = attach_in_root(dev_fd, top_fd, "dev")) || (result = (int)call(fchdir(dev_fd))))
		return result;
	for (size_t i = 0; i < N(devices); i++) {
		char source[32];

		snprintf(source, sizeof(source), "/dev/%s", devices[i]);
		if ((result = make_file(dev_fd, devices[i])) || (result = bind_path(source, devices[i], 0)))
			return result;
	}
	for (size_t i = 0; i < N(device_links); i++)
		if (symlinkat(device_links[i][0], dev_fd, device_links[i][1]))
			return -errno;
	if ((result = attach(pts_fd, dev_fd, "pts")))
		return result;
	if (queue_fd >= 0 && (result = attach(queue_fd, dev_fd, "mqueue")))
		return result;
	return dev_fd;
}

static int set_up_proc(int dev_fd, int top_fd)
{
	const char *source = inherited(CLONE_NEWPID) ? "/s/proc" : "/proc";
	int quiet_fd, fd, result;

	step = STEP_MOUNT;
	quiet_fd = own(CLONE_NEWPID) ? new_mount("proc", NULL, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV |
						 MOUNT_ATTR_NOEXEC) : clone_tree(AT_FDCWD, source);
	if (quiet_fd < 0)
		return quiet_fd;
	if ((result = attach(quiet_fd, dev_fd, ".nsfs/proc")))
		return result;
	fd = clone_tree(quiet_fd, "");
	if (fd < 0)
		return fd;
	result = attach_in_root(fd, top_fd, "proc");
	return result ? result : fd;
}

/* /sys: every entry of sysfs, and `namespaces` to be mounted on. */
static int set_up_sys(int dev_fd, int private_fd, int top_fd)
{
	const char *source = inherited(CLONE_NEWNET) ? "/s/sys" : "/sys";
	const unsigned int attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
	int quiet_fd, fd, result;
	char path[64];

	step = STEP_MOUNT;
	/* Whose interfaces a sysfs shows follows the network namespace, which must be ours to mount one. */
	quiet_fd = own(CLONE_NEWNET) ? new_mount("sysfs", NULL, attributes) : clone_tree(AT_FDCWD, source);
	if (quiet_fd < 0)
		return quiet_fd;
	if (!own(CLONE_NEWNET) && !own(CLONE_NEWUSER) &&
	    (result = set_mount(quiet_fd, MOUNT_ATTR_RDONLY, 0, false)))
		return result;
	/* For a while at the old root, from where it can be bound by path: half of what a tree of its own costs. */
	if ((result = attach(quiet_fd, AT_FDCWD, "/y")))
		return result;
	fd = clone_tree(private_fd, "sys");
	if (fd < 0)
		return fd;
	if ((result = attach_in_root(fd, top_fd, "sys")) || (result = (int)call(fchdir(fd))))
		return result;
	for (size_t i = 0; i < sys_entry_count; i++) {
		snprintf(path, sizeof(path), "/y/%.31s", sys_entries[i]);
		if ((result = make_dir(fd, sys_entries[i], 0755)))
			return result;
		result = bind_path(path, sys_entries[i], 0);
		if (result && result != -ENOENT)
			return result;
		if (!result && !own(CLONE_NEWNET) &&
		    (result = bind_path(NULL, sys_entries[i], MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV |
					MS_NOEXEC)))
			return result;
	}
	if ((result = attach(quiet_fd, dev_fd, ".nsfs/sys")))
		return result;
	if ((result = make_dir(fd, "namespaces", 0755)) || (result = set_mount(fd, MOUNT_ATTR_RDONLY, 0, false)))
		return result;
	return fd;
}

static int set_up_face(int dev_fd, int proc_fs_fd, int sys_fd)
{
	int result;

	step = STEP_FACE;
	if ((result = attach(given_faces[GIVEN_FACE], sys_fd, "namespaces")) ||
	    (result = make_file(dev_fd, "kmsg")) ||
	    (result = attach(given_faces[GIVEN_KMSG], dev_fd, "kmsg")))
		return result;
	return attach(given_faces[GIVEN_PROC_KMSG], proc_fs_fd, "kmsg");
}

static int set_up_binds(int top_fd)
{
	step = STEP_BIND;
	for (uint32_t i = 0; i < request.head.binds; i++) {
		struct stat st;
		char source[32];
		int fd, target_fd, result;

		if (fstat(request.bind_fds[i], &st))
			return -errno;
		snprintf(source, sizeof(source), "/s/%c%u", S_ISDIR(st.st_mode) ? 'd' : 'f', i);
		fd = open_tree(AT_FDCWD, source, OPEN_TREE_CLONE | AT_RECURSIVE);
		if (fd < 0)
			return fd;
		target_fd = open_target(top_fd, request.strings[1 + i], S_ISDIR(st.st_mode));
		if (target_fd < 0)
			return target_fd;
		if ((result = attach(fd, target_fd, "")))
			return result;
		close(target_fd);
		close(fd);
	}
	return 0;
}

/* Its root will be root of the host's user namespace. */
static bool in_initial_user_ns;

/* Where the root filesystem is among the templates; NULL when the mount namespace is shared. */
static const char *root_source;

/* The mount namespace; in it is still a copy of the templates. */
static int set_up_mounts(int channel_fd)
{
	const char *pts_options[][2] = {
		{ "newinstance", NULL }, { "ptmxmode", "0666" }, { "mode", "0620" },
		{ gid_mapped(5) ? "gid" : NULL, "5" }, { NULL, NULL } };
	int top_fd, private_fd, pts_fd, queue_fd, dev_fd, proc_fs_fd, sys_fd, fd, result;

	step = STEP_ROOT;
	/* With what hides the directories of the tree itself. */
	top_fd = open_tree(AT_FDCWD, root_source, OPEN_TREE_CLONE | AT_RECURSIVE);
	if (top_fd < 0)
		return top_fd;
	step = STEP_MOUNT;
	queue_fd = own(CLONE_NEWIPC) ? new_mount("mqueue", NULL, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV |
						 MOUNT_ATTR_NOEXEC) : clone_tree(AT_FDCWD, "/s/mqueue");
	/* Not every kernel has it. */
	if (queue_fd < 0 && queue_fd != -ENODEV && queue_fd != -ENOENT)
		return queue_fd;
	step = STEP_ROOT;
	if ((result = attach(top_fd, AT_FDCWD, "/")))
		return result;

	hear_spawner(channel_fd, 1);
	if ((result = become_root()))
		return result;
	private_fd = make_private();
	if (private_fd < 0)
		return private_fd;
	pts_fd = new_mount("devpts", pts_options, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
	if (pts_fd < 0)
		return pts_fd;
	for (size_t i = 0; i < N(private_dirs) && !(request.head.flags & FLAG_ROOTFS); i++) {
		fd = clone_tree(private_fd, private_dirs[i]);
		if (fd < 0)
			return fd;
		if ((result = attach_in_root(fd, top_fd, private_dirs[i])))
			return result;
		close(fd);
	}
	dev_fd = set_up_dev(private_fd, top_fd, pts_fd, queue_fd);
	if (dev_fd < 0)
		return dev_fd;
	proc_fs_fd = set_up_proc(dev_fd, top_fd);
	if (proc_fs_fd < 0)
		return proc_fs_fd;
	if ((result = take_given(channel_fd)))
		return result;
	sys_fd = set_up_sys(dev_fd, private_fd, top_fd);
	if (sys_fd < 0)
		return sys_fd;
	if ((result = set_up_face(dev_fd, proc_fs_fd, sys_fd)) || (result = set_up_binds(top_fd)))
		return result;
	step = STEP_PIVOT;
	/* The old root ends up on top of the new one at the same place, and goes with all that is on it. */
	if (fchdir(top_fd) || syscall(SYS_pivot_root, ".", ".") || detach(".") || chdir("/"))
		return -errno;
	return 0;
}

/* --- the system-call denylist: LXC's common.seccomp and kexec_file_load --- */

#define DENY (SECCOMP_RET_ERRNO | EPERM)
#define DENY_FORCE (SECCOMP_RET_ERRNO | EACCES)
/* Forward jumps to the end of the program are counted from the next instruction. */
#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define WHEN(value, then, otherwise) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), (then), (otherwise))
#define RETURN(value) BPF_STMT(BPF_RET | BPF_K, (value))
/*
 * The six that are denied and umount2, of one architecture; after it: allow, test the flags, deny.
 * syslog(2), which would read the host's kernel log, is the init's to filter.
 */
#define DENYLIST(kexec_load, kexec_file, by_handle, init, finit, delete, umount)		\
	WHEN(kexec_load, 9, 0), WHEN(kexec_file, 8, 0), WHEN(by_handle, 7, 0),			\
	WHEN(init, 6, 0), WHEN(finit, 5, 0), WHEN(delete, 4, 0), WHEN(umount, 1, 0),		\
	RETURN(SECCOMP_RET_ALLOW),								\
	/* args[] are 64 bits, little-endian; the flags are an int */				\
	LOAD(args[1]), BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, MNT_FORCE, 1, 2),			\
	RETURN(DENY), RETURN(DENY_FORCE), RETURN(SECCOMP_RET_ALLOW)

static const struct sock_filter filter[] = {
	LOAD(arch),
#if defined(__x86_64__)
	WHEN(AUDIT_ARCH_I386, 0, 14),
	LOAD(nr),
	DENYLIST(283, 0xffffffff, 342, 128, 350, 129, 52),
	WHEN(AUDIT_ARCH_X86_64, 0, 16),
	LOAD(nr),
	/* x32: the same numbers with one bit, but for kexec_load */
	WHEN(0x40000000 | 528, 15, 0),
	BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xbfffffff),
	DENYLIST(246, 320, 304, 175, 313, 176, 166),
	RETURN(SECCOMP_RET_ERRNO | ENOSYS),
	RETURN(DENY),
#elif defined(__aarch64__)
	WHEN(AUDIT_ARCH_ARM, 0, 14),
	LOAD(nr),
	DENYLIST(347, 401, 371, 128, 379, 129, 52),
	WHEN(AUDIT_ARCH_AARCH64, 0, 14),
	LOAD(nr),
	DENYLIST(104, 294, 265, 105, 273, 106, 39),
	RETURN(SECCOMP_RET_ERRNO | ENOSYS),
#else
#error "the system-call numbers of this architecture are not known"
#endif
};

/* Installed on the spawner, and so inherited: one for all containers, in time and in memory. */
static int install_filter(void)
{
	const struct sock_fprog program = { .len = N(filter), .filter = (struct sock_filter *)filter };

	return (int)call(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
}

/* What a container's root keeps that is root of the host's user namespace: systemd-nspawn's choice, without
 * CAP_MKNOD, since no device cgroup watches over it. */
static int drop_capabilities(void)
{
	static const int kept[] = {
		CAP_AUDIT_CONTROL, CAP_AUDIT_WRITE, CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH,
		CAP_FOWNER, CAP_FSETID, CAP_IPC_OWNER, CAP_KILL, CAP_LEASE, CAP_LINUX_IMMUTABLE,
		CAP_NET_BIND_SERVICE, CAP_NET_BROADCAST, CAP_NET_RAW, CAP_SETFCAP, CAP_SETGID,
		CAP_SETPCAP, CAP_SETUID, CAP_SYS_ADMIN, CAP_SYS_CHROOT, CAP_SYS_NICE, CAP_SYS_PTRACE,
		CAP_SYS_RESOURCE, CAP_SYS_TTY_CONFIG };
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[2] = { { 0 } };
	uint64_t keep = 0;

	step = STEP_IDENTITY;
	for (size_t i = 0; i < N(kept); i++)
		keep |= 1ULL << kept[i];
	/* reboot(2) in a PID namespace of one's own ends only that */
	if (own(CLONE_NEWPID))
		keep |= 1ULL << CAP_SYS_BOOT;
	if (own(CLONE_NEWNET))
		keep |= 1ULL << CAP_NET_ADMIN;
	for (int i = 0; i < 64; i++)
		if (!(keep >> i & 1) && prctl(PR_CAPBSET_DROP, i, 0, 0, 0) && errno != EINVAL)
			return -errno;
	if (syscall(SYS_capget, &header, data))
		return -errno;
	for (int i = 0; i < 2; i++) {
		const uint32_t part = (uint32_t)(keep >> 32 * i);

		data[i].permitted &= part;
		data[i].effective &= part;
		data[i].inheritable = 0;
	}
	return (int)call(syscall(SYS_capset, &header, data));
}

static int execute_init(int channel_fd)
{
	static char *const environment[] = { NULL };
	char flags[8], *argv[] = { (char *)"nsfs-init", flags, NULL };
	size_t n = 0;

	step = STEP_EXEC;
	if (own(CLONE_NEWCGROUP))
		flags[n++] = 'c';
	if (!own(CLONE_NEWPID))
		flags[n++] = 's';
	if (request.head.flags & FLAG_SYSLOG)
		flags[n++] = 'l';
	else if (filtered)
		flags[n++] = 'd';
	flags[n] = '\0';
	if (dup3(request.listen_fd, INIT_LISTEN_FD, 0) < 0 ||
	    dup3(request.payload_fd, INIT_PAYLOAD_FD, 0) < 0 ||
	    dup3(channel_fd, INIT_READY_FD, 0) < 0 ||
	    (own(CLONE_NEWCGROUP) && dup3(given_namespaces[GIVEN_CGROUP_NS], INIT_CGROUP_NS_FD, 0) < 0))
		return -errno;
	/* By descriptor: it is on no mount of this namespace.  All else is close-on-exec. */
	(void)syscall(SYS_execveat, root_fd, "nsfs-init", argv, environment, 0);
	return -errno;
}

/* A time namespace whose clocks are set can have no process yet: so it is made apart, and joined by exec. */
static int set_clocks(void)
{
	const char *text = request.strings[1 + request.head.binds];

	step = STEP_CLOCKS;
	if (unshare(CLONE_NEWTIME))
		return -errno;
	return write_file(proc_fd, "self/timens_offsets", text, strlen(text));
}

static int set_up(int channel_fd)
{
	int result;

	if (request.head.flags & FLAG_CLOCKS && (result = set_clocks()))
		return result;
	step = STEP_CGROUP;
	/* "0" is who writes, and to `tasks` it moves a thread without the lock of all process creation.  What
	 * counts are the credentials of whoever opened the file. */
	for (uint32_t i = 0; i < request.head.v1_groups; i++)
		if (write(request.v1_fds[i], "0", 1) != 1)
			return -errno;
	step = STEP_HOSTNAME;
	if (own(CLONE_NEWUTS) &&
	    (result = (int)call(sethostname(request.strings[0], strlen(request.strings[0])))))
		return result;
	if (own(CLONE_NEWNS)) {
		result = set_up_mounts(channel_fd);
	} else {
		hear_spawner(channel_fd, 1);
		result = become_root();
		if (!result)
			result = take_given(channel_fd);
		if (!result && chdir("/"))
			result = -errno;
	}
	if (result)
		return result;
	if (in_initial_user_ns && (result = drop_capabilities()))
		return result;
	return execute_init(channel_fd);
}

__attribute__((noreturn))
static void child(int channel_fd, int spawner_end_fd)
{
	struct init_result result = { .error = 0 };

	close(spawner_end_fd);
	result.error = set_up(channel_fd);
	result.step = step;
	(void)send(channel_fd, &result, sizeof(result), MSG_NOSIGNAL);
	_exit(1);
}

/* --- making --- */

/* Start something in a child that shares our descriptors; returns its PID or -errno. */
static int start_aside(int (*work)(void *), void *about, int cgroup_fd, uint64_t flags)
{
	int result;

	*left = (struct left){ .value = -EIO, .step = STEP_DIED };
	step = STEP_CLONE;
	result = clone_child(CLONE_FILES | flags, cgroup_fd, NULL);
	if (!result) {
		/* In two steps: there may be another child of ours that leaves something. */
		result = work(about);
		left->value = result;
		left->step = step;
		_exit(0);
	}
	return result;
}

/* See the child gone; returns what its work did: a descriptor, or 0, or -errno. */
static int end_aside(int pid)
{
	while (waitpid(pid, NULL, __WALL) < 0 && errno == EINTR)
		;
	step = left->step;
	return left->value;
}

static int aside(int (*work)(void *), void *about, int cgroup_fd)
{
	int pid = start_aside(work, about, cgroup_fd, CLONE_VFORK);

	return pid < 0 ? pid : end_aside(pid);
}

struct borrowed {
	int pid_fd, type;
	const char *filesystem;
};

static int mount_borrowed(void *about)
{
	const struct borrowed *what = about;

	step = STEP_MOUNT;
	return new_mount(what->filesystem, NULL, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
}

static int borrow_inside(void *about)
{
	struct borrowed *what = about;

	step = STEP_JOIN;
	if (what->pid_fd >= 0 && setns(what->pid_fd, what->type))
		return -errno;
	/* Only children are in the PID namespace that was joined. */
	return aside(mount_borrowed, what, -1);
}

/* Whose namespace of a type a container without its own is in: a pidfd or a namespace. */
static int source_of(int parent_fd, int type)
{
	for (uint32_t i = 0; i < request.head.joins; i++)
		if (ioctl(request.join_fds[i], NS_GET_NSTYPE) == type)
			return request.join_fds[i];
	return parent_fd;
}

/* A mount that shows the parent's namespace of a type, for a container without its own. */
static int borrow(int pid_fd, int type, const char *filesystem)
{
	struct borrowed what = { .pid_fd = pid_fd, .type = type, .filesystem = filesystem };

	return aside(borrow_inside, &what, -1);
}

/* Attach something at /s, from where the next clone copies it with its flags locked. */
static int place(int tree_fd, int *places_fd, const char *name, bool directory)
{
	int result;

	if (*places_fd < 0) {
		*places_fd = clone_tree(root_fd, "s");
		if (*places_fd < 0)
			return *places_fd;
		if ((result = attach(*places_fd, root_fd, "s")))
			return result;
	}
	result = directory ? make_dir(*places_fd, name, 0755) : make_file(*places_fd, name);
	if (result && result != -EEXIST)
		return result;
	return attach(tree_fd, *places_fd, name);
}

static int place_and_close(int tree_fd, int *places_fd, const char *name)
{
	int result = tree_fd < 0 ? tree_fd : place(tree_fd, places_fd, name, true);

	if (tree_fd >= 0)
		close(tree_fd);
	return result;
}

/* Mount an empty directory over each of those that a container has of its own. */
static int hide_private(int top_fd)
{
	for (size_t i = 0; i < N(private_dirs); i++) {
		int fd = clone_tree(root_fd, "e"), result;

		if (fd < 0)
			return fd;
		result = set_mount(fd, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, false);
		if (!result)
			result = attach(fd, top_fd, private_dirs[i]);
		close(fd);
		/* ENOTDIR: a link, as with ostree. */
		if (result && result != -ENOENT && result != -ENOTDIR)
			return result;
	}
	return 0;
}

/* The parent's root filesystem alone: "/" of its mount namespace, in which no path can mislead us. */
static int parent_root(pid_t pid)
{
	struct mount_attr attr = { .attr_set = MOUNT_ATTR_IDMAP | MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID |
		MOUNT_ATTR_NODEV, .userns_fd = (uint64_t)(unsigned int)nobody_fd };
	const unsigned int flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC;
	int fd, ns_fd = open_ns(pid, "mnt"), result;

	if (ns_fd < 0)
		return ns_fd;
	result = setns(ns_fd, CLONE_NEWNS) ? -errno : 0;
	close(ns_fd);
	if (result)
		return result;
	/* Best: nobody's, as the host's.  That can replace an idmap since Linux 6.15 only; but the root of a
	 * parent that has the default kind is nobody's already. */
	fd = (int)call(syscall(__NR_open_tree_attr, AT_FDCWD, "/", flags, &attr, sizeof(attr)));
	if (fd < 0) {
		fd = open_tree(AT_FDCWD, "/", OPEN_TREE_CLONE);
		if (fd >= 0 && set_mount(fd, attr.attr_set, nobody_fd, false))
			result = set_mount(fd, attr.attr_set & ~(uint64_t)MOUNT_ATTR_IDMAP, 0, false);
	}
	/* Our own has been there all the time. */
	if (setns(own_mnt_fd, CLONE_NEWNS) || fchdir(root_fd))
		abort();
	if (result) {
		close(fd);
		return result;
	}
	return fd;
}

/* --- user namespaces that exist for the sake of their map --- */

/* In a new user namespace: wait to be killed. */
static int clone_mapped(int *pid_fd)
{
	int result = clone_child(CLONE_NEWUSER, -1, pid_fd);

	if (!result)
		for (;;)
			pause();
	return result;
}

/* Enter the parent's namespaces so far that what is cloned then is nested in them. */
static int join_parent(int pid_fd, unsigned int types, bool other_user_ns)
{
	const struct spawner_request *head = &request.head;
	int result;

	step = STEP_JOIN;
	/* First what is not the user namespace, while we are root of the initial one: some of it may be owned
	 * by a user namespace further up. */
	if (types && setns(pid_fd, (int)types))
		return -errno;
	step = STEP_OWNER;
	/* The effective ID becomes the owner of the user namespace, the filesystem ID stays the host's root:
	 * so we can open what is root's in /proc and cgroups without a capability there. */
	if ((result = set_ids(-1, head->owner_gid, -1, true)) ||
	    (result = set_ids(-1, head->owner_uid, -1, false)))
		return result;
	setfsgid(0);
	setfsuid(0);
	step = STEP_JOIN;
	if (other_user_ns && setns(pid_fd, CLONE_NEWUSER))
		return -errno;
	return 0;
}

struct nested {
	int pid_fd, channel_fd, spawner_end_fd;
	bool other_user_ns;
	bool only_map;		/* not the container: just a user namespace with its maps */
};

static int clone_container(const struct nested *nested, int cgroup_fd, int *pid_fd)
{
	unsigned int types;
	int result;

	step = STEP_CLONE;
	if (nested->only_map)
		return clone_mapped(pid_fd);
	/* These two come later: they need a child in ID/payload, and the maps. */
	types = request.head.unshare & ~(unsigned int)(CLONE_NEWCGROUP | CLONE_NEWNET);
	if (request.head.flags & FLAG_CLOCKS)
		types &= ~(unsigned int)CLONE_NEWTIME;
	result = clone_child(types, cgroup_fd, pid_fd);
	if (!result)
		child(nested->channel_fd, nested->spawner_end_fd);
	return result;
}

static int do_nothing(void *unused)
{
	(void)unused;
	return 0;
}

static int clone_inside(void *about)
{
	int pid_fd, result = clone_container(about, -1, &pid_fd);

	return result < 0 ? result : pid_fd;
}

/* Join what the container shares with one that it is not in. */
static int join_others(void)
{
	step = STEP_JOIN;
	for (uint32_t i = 0; i < request.head.joins; i++)
		if (setns(request.join_fds[i], 0))
			return -errno;
	return 0;
}

/* Clone what `nested` says from within the parent's namespaces, and write the maps; returns a pidfd. */
static int clone_nested(void *about)
{
	struct nested *nested = about;
	const unsigned int unshared = request.head.unshare;
	/* These are inherited: the time namespace for its offsets, UTS for the domain name, PID to be nested in. */
	unsigned int types = CLONE_NEWPID | CLONE_NEWTIME | CLONE_NEWUTS;
	int pid_fd, result;

	types |= (CLONE_NEWCGROUP | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWNS) & ~unshared;
	if (nested->only_map)
		types = 0;
	else if ((result = join_others()))
		return result;
	types &= ~request.joined;
	/* At the top the only thing to be joined is the host's mount namespace. */
	if (nested->pid_fd < 0) {
		step = STEP_JOIN;
		if (types & CLONE_NEWNS && setns(host_mnt_fd, CLONE_NEWNS))
			return -errno;
		types = 0;
	}
	result = join_parent(nested->pid_fd, types, nested->other_user_ns);
	if (result)
		return result;
	/* From within the parent's cgroup namespace the init could not start commands in ID/payload, which is outside
	 * of that, where cgroups are mounted with `nsdelegate`. */
	if (types & CLONE_NEWCGROUP && (result = aside(do_nothing, NULL, request.payload_fd))) {
		step = STEP_CGROUP;
		return result == -ENOENT ? -EOPNOTSUPP : result;
	}
	/* A PID namespace can be made only by one who is in that above it, and that are our children. */
	pid_fd = aside(clone_inside, nested, -1);
	if (pid_fd < 0 || !(unshared & CLONE_NEWUSER))
		return pid_fd;
	result = pid_of(pid_fd);
	if (result > 0)
		result = write_maps(result);
	if (!result)
		return pid_fd;
	end(pid_fd);
	return result;
}

/* Clone the container from where we are: at the top, with a mount namespace of its own; returns a pidfd. */
static int clone_top(const struct nested *nested, int *pid)
{
	const struct spawner_request *head = &request.head;
	int pid_fd, result;

	step = STEP_OWNER;
	if ((result = set_ids(-1, head->owner_gid, -1, true)) ||
	    (result = set_ids(-1, head->owner_uid, -1, false)))
		return result;
	setfsgid(0);
	setfsuid(0);
	*pid = result = clone_container(nested, request.init_cgroup_fd, &pid_fd);
	if (set_ids(-1, 0, -1, false) || set_ids(-1, 0, -1, true))
		abort();
	if (result < 0 || !own(CLONE_NEWUSER))
		return result < 0 ? result : pid_fd;
	result = write_maps(*pid);
	if (!result)
		return pid_fd;
	end(pid_fd);
	return result;
}

/* Idmap the tree that shall be the root as the container's user namespace will map it.  That one does not exist
 * yet, and afterwards would be too late to have the mount's flags locked; but any with the same map will do. */
static int idmap_rootfs(const struct nested *like)
{
	struct nested nested = *like;
	int pid_fd, fd, result;

	nested.only_map = true;
	pid_fd = aside(clone_nested, &nested, -1);
	if (pid_fd < 0)
		return pid_fd;
	step = STEP_IDMAP;
	result = pid_of(pid_fd);
	if (result > 0) {
		fd = open_ns(result, "user");
		result = fd < 0 ? fd : set_mount(request.rootfs_fd, MOUNT_ATTR_IDMAP, fd, true);
		if (fd >= 0)
			close(fd);
	}
	end(pid_fd);
	return result;
}

/* Find the trees that the mount namespace shall have and put them where they are copied from. */
static int prepare_trees(const struct nested *nested, int *places_fd)
{
	const struct spawner_request *head = &request.head;
	int result;

	step = STEP_ROOT;
	root_source = "/s/root";
	if (head->flags & FLAG_ROOTFS) {
		if (head->flags & FLAG_IDMAP && (result = idmap_rootfs(nested)))
			return result;
		step = STEP_ROOT;
		/* Devices in a tree that somebody unpacked are not the container's to open. */
		if ((result = set_mount(request.rootfs_fd, MOUNT_ATTR_NODEV, 0, true)) ||
		    (result = confine(request.rootfs_fd, head->flags)) ||
		    (result = place(request.rootfs_fd, places_fd, "root", true)))
			return result;
	} else if (head->target_pid ||
		   (head->pid && ns_ino(head->pid, "mnt") != host_mnt_ino)) {
		const int fd = parent_root(head->target_pid ? head->target_pid : head->pid);

		/* Its private directories are hidden, so that it has the default kind: the host's. */
		if (fd == -EINVAL) {
			root_source = "/root";
		} else {
			result = fd < 0 ? fd : place(fd, places_fd, "root", true);
			if (!result)
				result = hide_private(fd);
			if (fd >= 0)
				close(fd);
			if (result)
				return result;
		}
	} else {
		root_source = "/root";
	}
	step = STEP_MOUNT;
	if (!own(CLONE_NEWIPC)) {
		result = place_and_close(borrow(source_of(nested->pid_fd, CLONE_NEWIPC), CLONE_NEWIPC, "mqueue"), places_fd, "mqueue");
		if (result && result != -ENODEV)
			return result;
	}
	if (inherited(CLONE_NEWPID) &&
	    (result = place_and_close(borrow(source_of(nested->pid_fd, CLONE_NEWPID), CLONE_NEWPID, "proc"),
				      places_fd, "proc")))
		return result;
	if (inherited(CLONE_NEWNET) &&
	    (result = place_and_close(borrow(source_of(nested->pid_fd, CLONE_NEWNET), CLONE_NEWNET, "sysfs"),
				      places_fd, "sys")))
		return result;
	step = STEP_BIND;
	for (uint32_t i = 0; i < head->binds; i++) {
		struct stat st;
		char name[16];

		if (fstat(request.bind_fds[i], &st))
			return -errno;
		snprintf(name, sizeof(name), "%c%u", S_ISDIR(st.st_mode) ? 'd' : 'f', i);
		if (head->read_only >> i & 1 &&
		    (result = set_mount(request.bind_fds[i], MOUNT_ATTR_RDONLY, 0, true)))
			return result;
		if ((result = confine(request.bind_fds[i], head->flags)) ||
		    (result = place(request.bind_fds[i], places_fd, name, S_ISDIR(st.st_mode))))
			return result;
	}
	return 0;
}

struct making {
	int pid_fd, channel_fd;
};

/* In a child that was born in ID/payload: make the namespaces that a container cannot be born with. */
static int make_namespaces(void *about)
{
	const struct making *making = about;
	struct ifreq lo = { .ifr_name = "lo", .ifr_flags = IFF_UP };
	char kind = NAMESPACES;
	int fds[GIVEN_NAMESPACES] = { -1, -1 }, fd = -1, result = 0;

	step = STEP_JOIN;
	if (!in_initial_user_ns && setns(making->pid_fd, CLONE_NEWUSER))
		return -errno;
	step = STEP_CGROUP;
	if (own(CLONE_NEWCGROUP)) {
		/* Its root is the group of whoever makes it. */
		if (unshare(CLONE_NEWCGROUP))
			return -errno;
		fds[GIVEN_CGROUP_NS] = result = open_ns(0, "cgroup");
	}
	if (own(CLONE_NEWNET) && result >= 0) {
		step = STEP_NET;
		/* Whose its files in sysfs are is decided now: so the maps have to be there. */
		result = (int)call(unshare(CLONE_NEWNET));
		if (!result)
			fds[GIVEN_NET_NS] = result = open_ns(0, "net");
	}
	if (result >= 0)
		result = send_with(making->channel_fd, &kind, 1, fds, N(fds));
	for (size_t i = 0; i < N(fds); i++)
		if (fds[i] >= 0)
			close(fds[i]);
	/* The container goes on while this is done; the spawner waits for both. */
	if (own(CLONE_NEWNET) && result >= 0) {
		fd = (int)call(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
		result = fd < 0 ? fd : (int)call(ioctl(fd, SIOCSIFFLAGS, &lo));
		if (fd >= 0)
			close(fd);
	}
	return result;
}

/* The files of the mount; the daemon is asked, so that may take some time. */
static int clone_faces(int fds[GIVEN_FACES])
{
	static const char *const suffixes[GIVEN_FACES] = { "", ".kmsg", ".pkmsg" };
	char path[64];

	step = STEP_FACE;
	for (size_t i = 0; i < GIVEN_FACES; i++) {
		snprintf(path, sizeof(path), "fuse/.f/%u%s", request.head.face, suffixes[i]);
		fds[i] = clone_tree(root_fd, path);
		if (fds[i] < 0)
			return fds[i];
	}
	return 0;
}

static int send_face(int channel_fd)
{
	int fds[GIVEN_FACES] = { -1, -1, -1 }, result;
	char kind = FACE;

	result = clone_faces(fds);
	/* Should the container be dead its end-of-file tells. */
	if (!result)
		(void)send_with(channel_fd, &kind, 1, fds, N(fds));
	for (size_t i = 0; i < GIVEN_FACES; i++)
		if (fds[i] >= 0)
			close(fds[i]);
	return result;
}

/* Get the container what takes long, while it is mounting. */
static int provide(const struct making *making)
{
	int pid = 0, result = 0, other;

	if (own(CLONE_NEWCGROUP) || own(CLONE_NEWNET)) {
		pid = start_aside(make_namespaces, (void *)making, request.payload_fd, 0);
		if (pid < 0)
			return pid;
	}
	if (own(CLONE_NEWNS))
		result = send_face(making->channel_fd);
	if (pid) {
		const uint32_t face_step = step;

		other = end_aside(pid);
		if (!result)
			result = other;
		else
			step = face_step;
	}
	return result;
}

/* Wait for what the child says; if it is dead already the channel's end tells. */
static void await_result(struct job *job, int pid, int pid_fd, int channel_fd)
{
	*job = (struct job){
		.busy = true, .pid = pid, .pid_fd = pid_fd, .channel_fd = channel_fd, .id = request.head.id, .op = request.head.op,
		.deadline_ms = now_ms() + DEADLINE_MS };
}

/* What a child has said, and the descriptor that came with it or -1; false when it said nothing. */
static bool receive_said(int channel_fd, void *said, size_t size, int *fd)
{
	size_t count;
	ssize_t length;

	*fd = -1;
	length = receive_with(channel_fd, MSG_DONTWAIT, said, size, fd, 1, &count);
	/* It ended before it read what we sent: that is told first, and then what it had said. */
	if (length == -ECONNRESET)
		length = receive_with(channel_fd, MSG_DONTWAIT, said, size, fd, 1, &count);
	return length == (ssize_t)size;
}

static bool receive_result(int channel_fd, struct init_result *result, int *fd)
{
	return receive_said(channel_fd, result, sizeof(*result), fd);
}

/* Begin to make a container.  On success the rest is up to its init, whose result comes from the channel. */
static int make(int *made_pid, int *made_pid_fd, int *made_channel_fd)
{
	const struct spawner_request *head = &request.head;
	struct nested nested = { .pid_fd = -1 };
	struct init_result said;
	char kind = MAPPED;
	int channel[2] = { -1, -1 }, places_fd = -1, pid_fd, pid = -1, fd, result = 0;

	if (head->pid) {
		nested.pid_fd = result = open_pid(head->pid);
		if (result < 0)
			goto out;
		nested.other_user_ns = ns_ino(head->pid, "user") != own_user_ino;
	}
	in_initial_user_ns = !own(CLONE_NEWUSER) && !nested.other_user_ns;
	if (own(CLONE_NEWNS) && (result = prepare_trees(&nested, &places_fd)))
		goto out;
	step = STEP_LIMIT;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, channel)) {
		result = -errno;
		goto out;
	}
	nested.spawner_end_fd = channel[0];
	nested.channel_fd = channel[1];
	if (head->pid || !own(CLONE_NEWNS) || head->joins) {
		pid_fd = aside(clone_nested, &nested, request.init_cgroup_fd);
		pid = pid_fd < 0 ? pid_fd : pid_of(pid_fd);
	} else {
		pid_fd = clone_top(&nested, &pid);
	}
	if (pid_fd < 0) {
		result = pid_fd;
		goto out;
	}
	step = STEP_DIED;
	result = pid;
	if (pid > 0) {
		(void)send_with(channel[0], &kind, 1, NULL, 0);
		result = provide(&(struct making){ .pid_fd = pid_fd, .channel_fd = channel[0] });
	}
	if (result) {
		end(pid_fd);
		goto out;
	}
	*made_pid = pid;
	*made_pid_fd = pid_fd;
	*made_channel_fd = channel[0];
	channel[0] = -1;
out:
	/* If the child failed first then that is the reason for all else. */
	if (result < 0 && channel[0] >= 0 && receive_result(channel[0], &said, &fd) && said.error) {
		result = said.error;
		step = said.step;
	}
	if (places_fd >= 0) {
		/* With all that is on it; the clone has its copy. */
		detach("/s");
		close(places_fd);
	}
	for (int i = 0; i < 2; i++)
		if (channel[i] >= 0)
			close(channel[i]);
	if (nested.pid_fd >= 0)
		close(nested.pid_fd);
	return result;
}

/* Memory that is shared with children of ours, and with no others. */
static bool map_left(void)
{
	left = mmap(NULL, sizeof(*left), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	return left != MAP_FAILED;
}

/* Whether something that making it waits for may be in the hands of others: processes of ours that are in their PID
 * namespace, where their root can stop them, or files that they serve. */
static bool others_have_a_hand(void)
{
	const struct spawner_request *head = &request.head;

	return head->pid || head->joins || head->binds || head->flags & FLAG_ROOTFS || !own(CLONE_NEWNS);
}

/* Make a container all by oneself: with mounts of one's own, since /s is for one at a time. */
static int make_alone(struct made *said)
{
	int pid_fd = -1, channel_fd = -1, fd, result;
	struct pollfd polled;

	step = STEP_LIMIT;
	if (!map_left() || unshare(CLONE_NEWNS))
		return -errno;
	own_mnt_fd = result = open_ns(0, "mnt");
	if (result < 0)
		return result;
	root_fd = result = (int)call(open("/", O_PATH | O_DIRECTORY | O_CLOEXEC));
	if (result < 0 || (result = make(&said->pid, &pid_fd, &channel_fd)))
		return result;
	polled = (struct pollfd){ .fd = channel_fd, .events = POLLIN };
	while (poll(&polled, 1, -1) < 0)
		;
	step = STEP_DIED;
	result = -EIO;
	if (receive_result(channel_fd, &said->result, &fd)) {
		step = said->result.step;
		result = said->result.error;
	}
	/* Gone before anybody is told: nothing is left behind. */
	if (result)
		end(pid_fd);
	return result;
}

/* OP_MAKE; `job` waits for the result. */
static int make_in_turn(struct job *job)
{
	int channel[2], pid_fd, pid, result;

	if (!others_have_a_hand()) {
		result = make(&pid, &pid_fd, &channel[0]);
		if (!result)
			await_result(job, pid, pid_fd, channel[0]);
		return result;
	}
	step = STEP_LIMIT;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, channel))
		return -errno;
	result = clone_child(0, -1, &pid_fd);
	if (!result) {
		struct made said = { .pid = 0 };

		said.result.error = make_alone(&said);
		said.result.step = step;
		(void)send_with(channel[1], &said, sizeof(said), NULL, 0);
		_exit(0);
	}
	close(channel[1]);
	if (result < 0) {
		close(channel[0]);
		return result;
	}
	await_result(job, 0, pid_fd, channel[0]);
	return 0;
}

/* --- acting in others' mount namespaces: in a child, since their filesystems may be slow or hostile --- */

/* Enter the mount namespace and root of a process; 0: the host's. */
static int enter_mounts(pid_t pid)
{
	char path[32];
	int fd, dir_fd, result;

	step = STEP_PROCESS;
	if (!pid)
		return (int)call(setns(host_mnt_fd, CLONE_NEWNS));
	snprintf(path, sizeof(path), "%d/root", (int)pid);
	fd = open_ns(pid, "mnt");
	if (fd < 0)
		return fd == -ENOENT ? -ESRCH : fd;
	dir_fd = (int)call(openat(proc_fd, path, O_PATH | O_CLOEXEC));
	if (dir_fd < 0)
		return dir_fd == -ENOENT ? -ESRCH : dir_fd;
	step = STEP_JOIN;
	result = (int)call(setns(fd, CLONE_NEWNS));
	if (!result && (fchdir(dir_fd) || chroot(".")))
		result = -errno;
	close(fd);
	close(dir_fd);
	return result;
}

/* The host's ID of the root in a process's user namespace, by its uid_map or gid_map; NOBODY when it has none. */
static uint32_t root_inside(pid_t pid, const char *map)
{
	uint32_t inside, outside, found = NOBODY;
	char path[64], line[64];
	FILE *file;
	int fd;

	if (!pid)
		return 0;
	snprintf(path, sizeof(path), "%d/%s", (int)pid, map);
	fd = openat(proc_fd, path, O_RDONLY | O_CLOEXEC);
	file = fd < 0 ? NULL : fdopen(fd, "r");
	if (!file) {
		if (fd >= 0)
			close(fd);
		return NOBODY;
	}
	while (found == NOBODY && fgets(line, sizeof(line), file))
		if (sscanf(line, "%u %u", &inside, &outside) == 2 && !inside)
			found = outside;
	fclose(file);
	return found;
}

/* What one file of somebody's mount namespace can be mounted on, made if need be: as that one's root, who says where
 * symbolic links lead, and without capabilities over files; and a filesystem that was mounted in a user namespace cannot
 * store the host's IDs. */
static int open_bind_target(pid_t pid, const char *path, bool directory)
{
	const uint32_t uid = root_inside(pid, "uid_map"), gid = root_inside(pid, "gid_map");
	int fd;

	step = STEP_PATH;
	fd = open_in_root(AT_FDCWD, path, O_PATH);
	if (fd != -ENOENT)
		return fd;
	/* With SECBIT_NO_SETUID_FIXUP they would stay. */
	if (prctl(PR_SET_SECUREBITS, 0, 0, 0, 0))
		return -errno;
	setfsgid(gid);
	setfsuid(uid);
	fd = open_target(AT_FDCWD, path, directory);
	setfsuid(0);
	setfsgid(0);
	return fd;
}

static int attach_at(pid_t pid, int tree_fd, const char *path)
{
	struct stat st;
	int fd;

	if (fstat(tree_fd, &st))
		return -errno;
	fd = open_bind_target(pid, path, S_ISDIR(st.st_mode));
	if (fd < 0)
		return fd;
	step = STEP_BIND;
	return attach(tree_fd, fd, "");
}

/* Attach a tree in a container's mount namespace so that the container's root cannot take back `read-only`.
 *
 * Flags get locked when a mount propagates into the mount namespace of another user namespace.  So a shared
 * directory of ours gets, for a moment, a slave on top of the container's root (whoever is there already is below
 * it), the tree is mounted on ours, and what has arrived in the slave is cloned. */
static int bind_locked(pid_t pid, int tree_fd, const char *path)
{
	struct stat st;
	const char *name;
	int mine_fd, shared_fd, slave_fd, locked_fd, result;

	step = STEP_BIND;
	if (fstat(tree_fd, &st))
		return -errno;
	name = S_ISDIR(st.st_mode) ? "d" : "f";
	if (unshare(CLONE_NEWNS))
		return -errno;
	mine_fd = open_ns(0, "mnt");
	shared_fd = clone_tree(AT_FDCWD, "/s");
	if (mine_fd < 0 || shared_fd < 0)
		return mine_fd < 0 ? mine_fd : shared_fd;
	result = S_ISDIR(st.st_mode) ? make_dir(shared_fd, name, 0755) : make_file(shared_fd, name);
	if ((result && result != -EEXIST) || (result = attach(shared_fd, AT_FDCWD, "/s")) ||
	    (result = set_propagation(shared_fd, MS_SHARED)))
		return result;
	slave_fd = clone_tree(shared_fd, "");
	if (slave_fd < 0)
		return slave_fd;

	if ((result = enter_mounts(pid)))
		return result;
	step = STEP_BIND;
	if ((result = attach(slave_fd, AT_FDCWD, "/")))
		return result;
	result = set_propagation(slave_fd, MS_SLAVE);
	if (!result && !(result = (int)call(setns(mine_fd, CLONE_NEWNS))))
		result = attach(tree_fd, shared_fd, name);
	/* Whatever happened: the slave must go again. */
	locked_fd = enter_mounts(pid);
	step = STEP_BIND;
	if (!locked_fd && !result)
		locked_fd = open_tree(slave_fd, name, OPEN_TREE_CLONE | AT_RECURSIVE);
	if (fchdir(slave_fd) || detach(".") || chdir("/"))
		return -errno;
	if (locked_fd < 0 || result)
		return result ? result : locked_fd;
	if ((result = confine(locked_fd, request.head.flags)))
		return result;
	return attach_at(pid, locked_fd, path);
}

/*
 * Resolve paths with the rights of whoever named them: their IDs, no supplementary groups, and no
 * capability over files, which setfsuid(2) drops and gives back.
 */
static int look_as(uid_t uid, gid_t gid)
{
	if (!uid)
		return 0;
	if (prctl(PR_SET_SECUREBITS, 0) < 0 || setgroups(0, NULL) < 0)
		return -errno;
	(void)setfsgid(gid);
	(void)setfsuid(uid);
	/* They tell of no error but by what they say next time. */
	if ((uid_t)setfsuid((uid_t)-1) != uid || (gid_t)setfsgid((gid_t)-1) != gid)
		return -EPERM;
	return 0;
}

/* Whose a sysctl is follows from the namespaces of whoever opens it, or reads it. */
static int access_sysctl(void *about)
{
	const struct spawner_request *head = &request.head;
	const bool writes = head->strings > 1;
	char path[256], value[4096];
	ssize_t length;
	int fd;

	/* The root of a PID namespace that was joined may stop us: then whoever waits for us is killed. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	step = STEP_PATH;
	snprintf(path, sizeof(path), "sys/%.200s", request.strings[0]);
	fd = (int)call(openat(proc_fd, path, (writes ? O_WRONLY : O_RDONLY) | O_CLOEXEC));
	if (fd < 0)
		return fd;
	if (writes)
		return write(fd, request.strings[1], strlen(request.strings[1])) < 0 ? -errno : 0;
	length = read(fd, value, sizeof(value));
	return length < 0 || write(*(int *)about, value, (size_t)length) < 0 ? -errno : 0;
}

/* Returns the end of a pipe that has what was read, or 0 when something was written. */
static int sysctl_inside(void)
{
	const struct spawner_request *head = &request.head;
	const bool other_user_ns = ns_ino(head->pid, "user") != own_user_ino;
	int pid_fd, ends[2], result;

	pid_fd = open_pid(head->pid);
	if (pid_fd < 0)
		return pid_fd;
	step = STEP_JOIN;
	if (pipe2(ends, O_CLOEXEC) || setns(pid_fd, (int)head->unshare))
		return -errno;
	/* As the container's root: a sysctl of the whole host is not that one's to write. */
	if (head->strings > 1 && other_user_ns &&
	    (setns(pid_fd, CLONE_NEWUSER) || set_ids(0, 0, 0, true) || set_ids(0, 0, 0, false)))
		return -EPERM;
	/* A change of credentials sets it to fs.suid_dumpable, which may be 1: and the child is to be seen inside. */
	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
		return -errno;
	/* A child, since only such a one is in a PID namespace that was joined. */
	result = aside(access_sysctl, &ends[1], -1);
	return result || head->strings > 1 ? result : ends[0];
}

/* Idmap a tree by the maps that came along, from the initial user namespace. */
static int idmap_tree(int tree_fd)
{
	int pid_fd, fd, result;

	step = STEP_CLONE;
	if ((result = clone_mapped(&pid_fd)) < 0)
		return result;
	result = write_maps(result);
	step = STEP_IDMAP;
	if (!result) {
		fd = open_ns(pid_of(pid_fd), "user");
		result = fd < 0 ? fd : set_mount(tree_fd, MOUNT_ATTR_IDMAP, fd, true);
		if (fd >= 0)
			close(fd);
	}
	end(pid_fd);
	return result;
}

/* Whether a character device is a terminal: then opening it has no effect on anything else (proc(5), tty/drivers). */
static bool is_terminal(dev_t device)
{
	int fd = openat(proc_fd, "tty/drivers", O_RDONLY | O_CLOEXEC);
	FILE *drivers = fd < 0 ? NULL : fdopen(fd, "r");
	unsigned int number, first, last;
	bool found = false;
	char line[256];

	if (!drivers) {
		if (fd >= 0)
			close(fd);
		return false;
	}
	/* NAME PATH MAJOR MINOR[-MINOR] TYPE; a name may hold blanks, a path does not. */
	while (!found && fgets(line, sizeof(line), drivers)) {
		const char *path = strstr(line, " /dev/");
		int fields = path ? sscanf(path, " %*s %u %u-%u", &number, &first, &last) : 0;

		found = fields >= 2 && number == major(device) && minor(device) >= first &&
			minor(device) <= (fields == 3 ? last : first);
	}
	fclose(drivers);
	return found;
}

/* A terminal for writing, opened with the rights of whoever named it; neither waits for a line nor becomes ours. */
static int open_terminal(const char *path)
{
	char link[32];
	struct stat st;
	unsigned int number;
	int path_fd = open_in_root(AT_FDCWD, path, O_PATH), fd;

	if (path_fd < 0)
		return path_fd;
	if (fstat(path_fd, &st))
		return -errno;
	step = STEP_TERMINAL;
	if (!S_ISCHR(st.st_mode) || !is_terminal(st.st_rdev))
		return -ENOTTY;
	snprintf(link, sizeof(link), "self/fd/%d", path_fd);
	fd = (int)call(openat(proc_fd, link, O_WRONLY | O_NOCTTY | O_NONBLOCK | O_CLOEXEC));
	if (fd < 0)
		return fd;
	/* The master of a pseudoterminal (of a new one, with /dev/ptmx) is nobody's screen. */
	return isatty(fd) && ioctl(fd, TIOCGPTN, &number) ? fd : -ENOTTY;
}

/* Where the files of the mount are in a container; the same order as GIVEN_FACE and so on. */
static int show_faces(pid_t pid)
{
	static const char *const targets[GIVEN_FACES] = { "/sys/namespaces", "/dev/kmsg", "/proc/kmsg" };
	int fds[GIVEN_FACES], result;

	if ((result = clone_faces(fds)) || (result = enter_mounts(pid)))
		return result;
	for (size_t i = 0; i < GIVEN_FACES && !result; i++) {
		step = STEP_FACE;
		/* EINVAL: its root has unmounted it. */
		result = detach(targets[i]);
		result = result && result != -EINVAL ? result : attach_at(pid, fds[i], targets[i]);
	}
	return result;
}

/* Whether whoever wrote a path, target_pid, sees there what was found: the same object, mounted alike. */
static int check_view(int found_fd)
{
	const struct spawner_request *head = &request.head;
	struct stat found, seen;
	struct statvfs found_mount, seen_mount;
	int fd, result;

	if ((result = enter_mounts(head->target_pid)))
		return result;
	step = STEP_VIEW;
	if ((result = look_as(head->owner_uid, head->owner_gid)))
		return result;
	fd = open_in_root(AT_FDCWD, request.strings[0], O_PATH);
	(void)setfsuid(0);
	if (fd < 0 || fstat(found_fd, &found) || fstat(fd, &seen) || fstatvfs(found_fd, &found_mount) ||
	    fstatvfs(fd, &seen_mount) || found.st_dev != seen.st_dev || found.st_ino != seen.st_ino ||
	    found_mount.f_flag != seen_mount.f_flag)
		return -EXDEV;
	return 0;
}

/* Returns a descriptor to pass on, -errno, or 0. */
static int act(void)
{
	const struct spawner_request *head = &request.head;
	int fd, tree_fd, result;

	switch (head->op) {
	case OP_TREE:
	case OP_TERMINAL:
		if ((result = enter_mounts(head->pid)))
			return result;
		step = STEP_PATH;
		if ((result = look_as(head->owner_uid, head->owner_gid)))
			return result;
		if (head->op == OP_TERMINAL)
			return open_terminal(request.strings[0]);
		fd = open_in_root(AT_FDCWD, request.strings[0], O_PATH);
		(void)setfsuid(0);
		if (fd < 0)
			return fd;
		/* Only what is in one's own mount namespace can be cloned. */
		tree_fd = clone_tree(fd, "");
		result = tree_fd >= 0 && head->target_pid ? check_view(fd) : 0;
		return result ? result : tree_fd;
	case OP_IDMAP:
		return idmap_tree(request.fds[0]);
	case OP_PIN: {
		char path[64];

		step = STEP_PROCESS;
		snprintf(path, sizeof(path), "%d/ns/%.16s", (int)head->pid, request.strings[0]);
		fd = clone_tree(proc_fd, path);
		if (fd < 0 || head->strings < 2)
			return fd;
		if ((result = enter_mounts(head->target_pid)))
			return result;
		result = attach_at(head->target_pid, fd, request.strings[1]);
		close(fd);
		return result;
	}
	case OP_BIND:
		step = STEP_BIND;
		if ((result = confine(request.fds[0], head->flags)))
			return result;
		if (head->flags & FLAG_READ_ONLY) {
			result = set_mount(request.fds[0], MOUNT_ATTR_RDONLY, 0, true);
			if (result || head->pid)
				return result ? result : bind_locked(head->pid, request.fds[0],
								     request.strings[0]);
		}
		result = enter_mounts(head->pid);
		return result ? result : attach_at(head->pid, request.fds[0], request.strings[0]);
	case OP_SHOW:
		return show_faces(head->pid);
	case OP_UNBIND:
		if ((result = enter_mounts(head->pid)))
			return result;
		/* Whatever a symbolic link makes of the path is in the container's own mount namespace. */
		step = STEP_PATH;
		return detach(request.strings[0]);
	case OP_SYSCTL:
		return sysctl_inside();
	default:
		return -EINVAL;
	}
}

static int act_aside(struct job *job)
{
	int channel[2], pid_fd, result;

	step = STEP_LIMIT;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, channel))
		return -errno;
	result = clone_child(0, -1, &pid_fd);
	if (!result) {
		int fd = map_left() ? act() : -errno;

		struct init_result said = { .error = fd < 0 ? fd : 0, .step = step };

		(void)send_with(channel[1], &said, sizeof(said), &fd, fd > 0);
		_exit(0);
	}
	close(channel[1]);
	if (result < 0) {
		close(channel[0]);
		return result;
	}
	await_result(job, 0, pid_fd, channel[0]);
	return 0;
}

/* --- what is done at once --- */

static int hostname(struct spawner_reply *reply)
{
	const struct spawner_request *head = &request.head;
	int fd = open_ns(head->pid, "uts"), result;

	step = STEP_PROCESS;
	if (fd < 0)
		return fd == -ENOENT ? -ESRCH : fd;
	result = (int)call(setns(fd, CLONE_NEWUTS));
	close(fd);
	if (result)
		return result;
	step = STEP_HOSTNAME;
	if (head->op == OP_HOSTNAME)
		result = (int)call(gethostname(reply->text, sizeof(reply->text) - 1));
	else
		result = (int)call(sethostname(request.strings[0], strlen(request.strings[0])));
	if (setns(own_uts_fd, CLONE_NEWUTS))
		abort();
	return result;
}

static int open_output(void)
{
	char path[64];

	step = STEP_OUTPUT;
	/* Kept open, so that its name stays known to the kernel: see World.prime(). */
	if (faces_fd < 0)
		faces_fd = openat(root_fd, "fuse/.f", O_PATH | O_DIRECTORY | O_CLOEXEC);
	snprintf(path, sizeof(path), "fuse/.f/%u.output", request.head.face);
	return (int)call(openat(root_fd, path, O_WRONLY | O_APPEND | O_CLOEXEC));
}

static int clone_log(void)
{
	char path[64];

	step = STEP_FACE;
	snprintf(path, sizeof(path), "fuse/.f/%u.%.8s", request.head.face, request.strings[0]);
	return clone_tree(root_fd, path);
}

/* --- requests and replies --- */

/*
 * Close what a request that failed has left open.  Children that share our descriptors are born in the container's
 * cgroup, so its removal may kill them anywhere, between an open(2) and a close(2) as well.
 */
static void sweep(void)
{
	int from = kept_fds;

	for (;;) {
		int next = INT_MAX;

		if (faces_fd >= from)
			next = faces_fd;
		for (size_t i = 0; i < JOBS_MAX; i++) {
			if (!jobs[i].busy)
				continue;
			if (jobs[i].pid_fd >= from && jobs[i].pid_fd < next)
				next = jobs[i].pid_fd;
			if (jobs[i].channel_fd >= from && jobs[i].channel_fd < next)
				next = jobs[i].channel_fd;
		}
		if (from < next)
			(void)syscall(SYS_close_range, from, next == INT_MAX ? INT_MAX : next - 1, 0);
		if (next == INT_MAX)
			return;
		from = next + 1;
	}
}

/* If the daemon is gone its end-of-file comes next. */
static void reply_with(struct spawner_reply reply, int fd)
{
	(void)send_with(socket_fd, &reply, sizeof(reply), &fd, 1);
	if (fd >= 0)
		close(fd);
}

/* Take a message apart; everything in it is checked, though it comes from the daemon. */
static int parse(size_t length)
{
	const struct spawner_request *head = &request.head;
	const size_t extents = (size_t)head->uid_extents + head->gid_extents;
	size_t at = sizeof(*head), wanted;

	step = STEP_REQUEST;
	if (length < at || head->uid_extents > MAP_EXTENTS_MAX || head->gid_extents > MAP_EXTENTS_MAX ||
	    head->strings > N(request.strings) || head->binds > BINDS_MAX ||
	    head->v1_groups > V1_GROUPS_MAX || length - at < extents * sizeof(struct map_extent))
		return -EINVAL;
	memcpy(request.extents, message + at, extents * sizeof(struct map_extent));
	at += extents * sizeof(struct map_extent);
	message[length] = '\0';
	for (uint32_t i = 0; i < head->strings; i++) {
		if (at >= length)
			return -EINVAL;
		request.strings[i] = message + at;
		at += strlen(message + at) + 1;
	}
	if (head->pid < 0 || head->target_pid < 0)
		return -ESRCH;
	switch (head->op) {
	case OP_MAKE:
		if (head->joins > JOINS_MAX)
			return -EINVAL;
		wanted = 3 + head->v1_groups + head->binds + (head->flags & FLAG_ROOTFS ? 1 : 0) + head->joins;
		if (head->strings != 1 + head->binds + !!(head->flags & FLAG_CLOCKS) || request.fd_count != wanted ||
		    head->unshare & ~(unsigned int)OWN_ALL)
			return -EINVAL;
		request.listen_fd = request.fds[0];
		request.init_cgroup_fd = request.fds[1];
		request.payload_fd = request.fds[2];
		request.v1_fds = request.fds + 3;
		request.bind_fds = request.v1_fds + head->v1_groups;
		if (head->flags & FLAG_ROOTFS)
			request.rootfs_fd = *request.bind_fds++;
		request.join_fds = request.bind_fds + head->binds;
		request.joined = 0;
		for (uint32_t i = 0; i < head->joins; i++)
			request.joined |= (unsigned int)ioctl(request.join_fds[i], NS_GET_NSTYPE);
		/* A type that is no namespace at all is -1: all bits. */
		return request.joined & ~(unsigned int)JOINED || request.joined & head->unshare ? -EINVAL : 0;
	case OP_BIND:
		return head->strings == 1 && request.fd_count == 1 ? 0 : -EINVAL;
	case OP_IDMAP:
		return head->uid_extents && head->gid_extents && request.fd_count == 1 ? 0 : -EINVAL;
	case OP_SYSCTL:
		if (head->unshare & ~(unsigned int)(CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWPID) || !head->unshare)
			return -EINVAL;
		/* fall through */
	case OP_PIN:
		return head->strings >= 1 && head->strings <= 2 ? 0 : -EINVAL;
	case OP_SET_HOSTNAME:
	case OP_LOG:
	case OP_TREE:
	case OP_TERMINAL:
	case OP_UNBIND:
		return head->strings == 1 ? 0 : -EINVAL;
	case OP_HOSTNAME:
	case OP_OUTPUT:
	case OP_FEATURES:
	case OP_SHOW:
		return 0;
	default:
		return -EOPNOTSUPP;
	}
}

/* One request.  Ends the program at the end-of-file. */
static void hear(struct job *job)
{
	struct spawner_reply reply = { .id = 0 };
	ssize_t length = receive_with(socket_fd, 0, message, sizeof(message) - 1,
				      request.fds, MESSAGE_FDS_MAX, &request.fd_count);
	int fd = -1, result;

	if (length == -EINTR || length == -EAGAIN)
		return;
	if (!length || (length < 0 && length != -E2BIG))
		_exit(0);
	memset(&request.head, 0, sizeof(request.head));
	/* Of a message that is too long the beginning is there, and so its number. */
	memcpy(&request.head, message, length < 0 || (size_t)length > sizeof(request.head) ?
	       sizeof(request.head) : (size_t)length);
	step = STEP_REQUEST;
	result = length < 0 ? (int)length : parse((size_t)length);
	if (!result)
		switch (request.head.op) {
		case OP_MAKE:
			result = make_in_turn(job);
			break;
		case OP_HOSTNAME:
		case OP_SET_HOSTNAME:
			result = hostname(&reply);
			break;
		case OP_OUTPUT:
			fd = result = open_output();
			break;
		case OP_LOG:
			fd = result = clone_log();
			break;
		case OP_FEATURES:
			reply.value = features;
			break;
		default:
			result = act_aside(job);
		}
	for (size_t i = 0; i < request.fd_count; i++)
		close(request.fds[i]);
	if (job->busy)
		return;
	reply.id = request.head.id;
	reply.error = result < 0 ? result : 0;
	reply.step = result < 0 ? step : STEP_NONE;
	reply_with(reply, fd);
	if (result < 0)
		sweep();
}

/* A child has said how it went, or died, or has to. */
static void finish(struct job *job, bool too_late)
{
	struct spawner_reply reply = { .id = job->id };
	struct made said = { .pid = job->pid };
	const bool made_aside = job->op == OP_MAKE && !job->pid;
	int fd = -1;

	if (too_late) {
		reply.error = -ETIMEDOUT;
		reply.step = STEP_DEADLINE;
	} else if (receive_said(job->channel_fd, &said, made_aside ? sizeof(said) : sizeof(said.result), &fd)) {
		reply.error = said.result.error;
		reply.step = said.result.step;
	} else {
		reply.error = -EIO;
		reply.step = STEP_DIED;
	}
	if (job->op == OP_MAKE && !reply.error) {
		reply.pid = said.pid;
		reply.step = STEP_NONE;
	}
	/* Gone before anybody is told: nothing is left behind. */
	if (reply.error || job->op != OP_MAKE) {
		end_within(job->pid_fd, END_MS);
		job->pid_fd = -1;
	}
	if (job->pid_fd >= 0)
		close(job->pid_fd);
	close(job->channel_fd);
	job->busy = false;
	reply_with(reply, fd);
	if (reply.error)
		sweep();
}

/* Inits that ended, and whoever else was orphaned. */
static void reap(void)
{
	while (waitpid(-1, NULL, WNOHANG | __WALL) > 0)
		;
}

__attribute__((noreturn))
static void serve(void)
{
	struct pollfd polled[2 + JOBS_MAX];

	for (;;) {
		struct job *free_job = NULL;
		int64_t now = now_ms(), first = now + 3600 * 1000;

		polled[1] = (struct pollfd){ .fd = signal_fd, .events = POLLIN };
		for (size_t i = 0; i < JOBS_MAX; i++) {
			polled[2 + i] = (struct pollfd){
				.fd = jobs[i].busy ? jobs[i].channel_fd : -1, .events = POLLIN };
			if (!jobs[i].busy)
				free_job = &jobs[i];
			else if (jobs[i].deadline_ms < first)
				first = jobs[i].deadline_ms;
		}
		polled[0] = (struct pollfd){ .fd = free_job ? socket_fd : -1, .events = POLLIN };
		if (poll(polled, N(polled), first > now ? (int)(first - now) : 0) < 0)
			continue;
		now = now_ms();
		for (size_t i = 0; i < JOBS_MAX; i++)
			if (jobs[i].busy && (polled[2 + i].revents || jobs[i].deadline_ms <= now))
				finish(&jobs[i], !polled[2 + i].revents);
		if (polled[1].revents) {
			struct signalfd_siginfo unused;

			(void)read(signal_fd, &unused, sizeof(unused));
		}
		reap();
		if (polled[0].revents && free_job)
			hear(free_job);
	}
}

/* --- the start --- */

__attribute__((noreturn))
static void die(const char *what, int error)
{
	dprintf(STDERR_FILENO, "nsfs-spawner: %s: %s\n", what, strerror(error < 0 ? -error : error));
	_exit(1);
}

static int need(int result, const char *what)
{
	if (result < 0)
		die(what, result);
	return result;
}

/* A descriptor of ours goes where no init wants one. */
static int keep(int fd, const char *what)
{
	int high;

	need(fd, what);
	high = fcntl(fd, F_DUPFD_CLOEXEC, FIRST_FD);
	need((int)call(high), what);
	close(fd);
	return high;
}

/* A user namespace that maps no ID of the host. */
static int make_nobody(void)
{
	int fd, pid, pid_fd;

	request.head.uid_extents = request.head.gid_extents = 1;
	request.extents[0] = request.extents[1] = (struct map_extent){ NOBODY, NOBODY, 1 };
	pid = need(clone_mapped(&pid_fd), "clone3 of a user namespace");
	need(write_maps(pid), "uid_map");
	fd = open_ns(pid, "user");
	end(pid_fd);
	return fd;
}

/* The template of the root filesystem: of the host, but nobody's. */
static int make_root_template(void)
{
	const uint64_t attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV;
	int fd = need(clone_tree(AT_FDCWD, "/"), "open_tree /");

	/* ramfs cannot, nor can tmpfs before Linux 6.3, nor overlayfs. */
	if (!set_mount(fd, MOUNT_ATTR_IDMAP, nobody_fd, false))
		features |= FEATURE_IDMAPPED_ROOT;
	need(set_mount(fd, attributes, 0, false), "mount_setattr of the root");
	return fd;
}

static void copy_program(int from_fd)
{
	char buffer[65536];
	ssize_t length;
	int fd = need((int)call(openat(root_fd, "nsfs-init", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0700)),
		      "nsfs-init");

	while ((length = read(from_fd, buffer, sizeof(buffer))) > 0)
		if (write(fd, buffer, (size_t)length) != length)
			die("write nsfs-init", errno);
	/* Nobody can read it but the host's root: so its process cannot be traced by others. */
	if (length < 0 || fchmod(fd, 0111))
		die("nsfs-init", errno);
	close(fd);
	close(from_fd);
}

static void list_sys(int sys_fd)
{
	int fd = need((int)call(openat(sys_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)), "/sys");
	DIR *dir = fdopendir(fd);
	struct dirent *entry;

	if (!dir)
		die("/sys", errno);
	while ((entry = readdir(dir)))
		if (entry->d_type == DT_DIR && entry->d_name[0] != '.' &&
		    strlen(entry->d_name) < sizeof(sys_entries[0]) && sys_entry_count < SYS_ENTRIES_MAX)
			strcpy(sys_entries[sys_entry_count++], entry->d_name);
	closedir(dir);
}

/* Build the mount namespace of templates and leave the host's. */
static void build_templates(const char *tree, int init_fd)
{
	static const struct { const char *name; unsigned int minor; } nodes[] = {
		{ "dev/null", 3 }, { "dev/zero", 5 }, { "dev/full", 7 }, { "dev/random", 8 },
		{ "dev/urandom", 9 } };
	static const char *const directories[] = { "root", "fuse", "dev", "proc", "sys", "s", "t", "y", "e" };
	static const char *const options[][2] = { { "mode", "0755" }, { NULL, NULL } };
	int fd, sys_fd;

	if (unshare(CLONE_NEWNS))
		die("unshare", errno);
	/* Nothing of what we do is to be seen outside; nor is the filesystem to stay unbindable here. */
	need((int)call(syscall(SYS_mount, NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)),
	     "mount private");
	fuse_fd = keep(clone_tree(AT_FDCWD, tree), tree);
	root_fd = keep(new_mount("tmpfs", options, MOUNT_ATTR_NOSUID), "tmpfs");
	for (size_t i = 0; i < N(directories); i++)
		need(make_dir(root_fd, directories[i], 0755), directories[i]);
	umask(0);
	for (size_t i = 0; i < N(nodes); i++)
		need((int)call(mknodat(root_fd, nodes[i].name, S_IFCHR | 0666, makedev(1, nodes[i].minor))),
		     nodes[i].name);
	need((int)call(mknodat(root_fd, "dev/tty", S_IFCHR | 0666, makedev(5, 0))), "dev/tty");
	umask(022);
	copy_program(init_fd);
	proc_fd = keep(new_mount("proc", NULL, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC), "proc");
	sys_fd = keep(new_mount("sysfs", NULL, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC), "sysfs");
	list_sys(sys_fd);
	nobody_fd = keep(make_nobody(), "user namespace");
	fd = make_root_template();
	need(attach(root_fd, AT_FDCWD, "/"), "move_mount");
	need(attach(fd, root_fd, "root"), "move_mount root");
	need(hide_private(fd), "move_mount over private directories");
	need(attach(fuse_fd, root_fd, "fuse"), "move_mount fuse");
	need(attach(proc_fd, root_fd, "proc"), "move_mount proc");
	need(attach(sys_fd, root_fd, "sys"), "move_mount sys");
	close(fd);
	close(sys_fd);
	if (fchdir(root_fd) || syscall(SYS_pivot_root, ".", ".") || detach(".") || chdir("/"))
		die("pivot_root", errno);
}

/* Whether an idmap can be replaced: on a clone of what we have. */
static void try_features(void)
{
	struct mount_attr attr = { .attr_set = MOUNT_ATTR_IDMAP,
		.userns_fd = (uint64_t)(unsigned int)nobody_fd };
	int fd;

	if (!(features & FEATURE_IDMAPPED_ROOT))
		return;
	fd = (int)call(syscall(__NR_open_tree_attr, AT_FDCWD, "/root", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC,
			       &attr, sizeof(attr)));
	if (fd >= 0) {
		features |= FEATURE_REMAPPED_ROOT;
		close(fd);
	}
}

/* What every container inherits, so that none has to be given it. */
static void set_defaults(void)
{
	static const struct { __rlimit_resource_t resource; rlim_t soft, hard; } limits[] = {
		{ RLIMIT_NOFILE, 1024, 524288 }, { RLIMIT_CORE, 0, RLIM_INFINITY },
		{ RLIMIT_CPU, RLIM_INFINITY, RLIM_INFINITY }, { RLIMIT_FSIZE, RLIM_INFINITY, RLIM_INFINITY },
		{ RLIMIT_AS, RLIM_INFINITY, RLIM_INFINITY }, { RLIMIT_DATA, RLIM_INFINITY, RLIM_INFINITY },
		{ RLIMIT_STACK, 8 << 20, RLIM_INFINITY }, { RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY },
		{ RLIMIT_MEMLOCK, 8 << 20, 8 << 20 } };
	/* Raw, and so with those signals that the C library keeps to itself; zero is SIG_DFL. */
	const uint64_t all = ~0ULL, no_action[4] = { 0 };
	sigset_t child_set;

	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, NULL, sizeof(all));
	for (int number = 1; number < NSIG; number++)
		syscall(SYS_rt_sigaction, number, no_action, NULL, sizeof(all));
	syscall(SYS_close_range, SPAWNER_SOCKET_FD + 1, ~0U, 0);
	umask(022);
	for (size_t i = 0; i < N(limits); i++) {
		struct rlimit limit = { limits[i].soft, limits[i].hard }, old;

		/* Higher than fs.nr_open is not possible: then the hard limit stays what it is. */
		if (setrlimit(limits[i].resource, &limit) && !getrlimit(limits[i].resource, &old)) {
			limit.rlim_max = old.rlim_max;
			if (limit.rlim_cur > limit.rlim_max)
				limit.rlim_cur = limit.rlim_max;
			(void)setrlimit(limits[i].resource, &limit);
		}
	}
	(void)write_file(AT_FDCWD, "/proc/self/oom_score_adj", "0", 1);
	if (syscall(SYS_setgroups, 0, NULL))
		die("setgroups", errno);
	/* Our effective ID becomes the owner's for a moment; our capabilities stay. */
	if (prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) ||
	    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) || prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) ||
	    prctl(PR_SET_NAME, "nsfs-spawner", 0, 0, 0))
		die("prctl", errno);
	sigemptyset(&child_set);
	sigaddset(&child_set, SIGCHLD);
	signal_fd = keep((int)call(signalfd(-1, &child_set, SFD_CLOEXEC | SFD_NONBLOCK)), "signalfd");
}

static int open_beside_us(const char *name)
{
	char path[4096 + 32];
	ssize_t length = readlink("/proc/self/exe", path, 4096);
	char *slash;

	if (length <= 0 || length >= 4096)
		die("/proc/self/exe", errno);
	path[length] = '\0';
	slash = strrchr(path, '/');
	strcpy(slash ? slash + 1 : path, name);
	return need((int)call(open(path, O_RDONLY | O_CLOEXEC)), path);
}

int main(int argc, char **argv)
{
	struct stat st;
	int null_fd, init_fd;

	if (argc < 3 || argc > 4 || strcmp(argv[1], "--tree") || (argc == 4 && strcmp(argv[3], "--no-filter"))) {
		dprintf(STDERR_FILENO, "usage: nsfs-spawner --tree DIR [--no-filter]\n");
		return 2;
	}
	set_defaults();
	socket_fd = keep(SPAWNER_SOCKET_FD, "descriptor 3");
	init_fd = keep(open_beside_us("nsfs-init"), "nsfs-init");
	host_mnt_fd = keep((int)call(open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC)), "/proc/self/ns/mnt");
	own_uts_fd = keep((int)call(open("/proc/self/ns/uts", O_RDONLY | O_CLOEXEC)), "/proc/self/ns/uts");
	if (!map_left())
		die("mmap", errno);
	if (fstat(host_mnt_fd, &st))
		die("fstat", errno);
	host_mnt_ino = st.st_ino;
	build_templates(argv[2], init_fd);
	own_mnt_fd = keep(open_ns(getpid(), "mnt"), "own mount namespace");
	own_user_ino = ns_ino(getpid(), "user");
	try_features();
	filtered = argc < 4;
	if (filtered)
		need(install_filter(), "seccomp");

	/* From here on 0, 1, 2 are what an init has, and 3 to 19 are closed by its exec. */
	null_fd = need((int)call(openat(root_fd, "dev/null", O_RDWR | O_CLOEXEC)), "dev/null");
	for (int fd = 0; fd < FIRST_FD; fd++)
		if (fd != null_fd && dup3(null_fd, fd, fd < 3 ? 0 : O_CLOEXEC) < 0)
			_exit(1);
	if (fcntl(null_fd, F_SETFD, null_fd < 3 ? 0 : FD_CLOEXEC))
		_exit(1);
	for (int fd = FIRST_FD; fd < FIRST_FD + KEPT_MAX; fd++)
		if (fcntl(fd, F_GETFD) >= 0)
			kept_fds = fd + 1;
	serve();
}
