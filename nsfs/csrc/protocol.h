/*
 * What the daemon, the spawner and the inits say to each other.  nsfs/spawner.py has the same in Python.
 *
 * Every message is one packet on a SOCK_SEQPACKET socket: a struct, then its variable part, with the
 * descriptors by SCM_RIGHTS.  Host byte order; both ends come from one build.
 */
#ifndef NSFS_PROTOCOL_H
#define NSFS_PROTOCOL_H

#include <stdint.h>

#define SPAWNER_SOCKET_FD 3
#define SPAWNER_MESSAGE_MAX 65536	/* bytes */
#define INIT_MESSAGE_MAX 196608		/* bytes; argv and the environment of a command */
#define MESSAGE_FDS_MAX 200		/* the kernel's limit is 253 */

/* --- daemon to spawner --- */

enum spawner_op {
	/* Make a container.  extents: uid_map, then gid_map; strings: hostname, then each bind's target.
	 * fds: listening socket, ID/init, ID/payload (cgroup directories), `tasks` of each v1 group, the
	 * root's tree if any, each bind's tree, each namespace to be joined.  Reply: pid. */
	OP_MAKE = 1,
	OP_HOSTNAME,		/* pid; reply: text */
	OP_SET_HOSTNAME,	/* pid, string: the name */
	/* pid, string: a path as pid sees it and owner_uid and owner_gid may go; reply: fd, a detached clone of
	 * the tree there.  EXDEV unless target_pid, if given, sees the same there */
	OP_TREE,
	OP_PIN,			/* pid, strings: namespace type; [path]; target_pid: whose mount namespace; reply: fd when no path */
	OP_BIND,		/* pid, string: target; fds: a detached tree */
	OP_UNBIND,		/* pid, string: target */
	OP_OUTPUT,		/* face; reply: fd, `.f/FACE.output` open for appending */
	OP_FEATURES,		/* reply: value, enum spawner_feature */
	/* pid, strings: a file below /proc/sys; [value to write]; unshare: the namespaces of pid that it is of;
	 * reply: fd, from which to read what is in it.  Written as the root of pid's user namespace. */
	OP_SYSCTL,
	/* fds: a detached tree; extents: uid_map, gid_map, from IDs on disk to the host's: idmap it so */
	OP_IDMAP,
	/* pid, string: a path as pid sees it and owner_uid and owner_gid may open it; reply: fd, a terminal for writing */
	OP_TERMINAL,
	OP_SHOW,		/* pid, face: put the files of the mount in the place of those of another one */
	OP_LOG,			/* face, string: `kmsg` or `pkmsg`; reply: fd, a detached mount of `.f/FACE.STRING` */
};

enum spawner_flag {
	FLAG_ROOTFS = 1,	/* OP_MAKE: the root is the tree sent along */
	FLAG_IDMAP = 2,		/* OP_MAKE: idmap that tree by the new user namespace */
	FLAG_CLOCKS = 8,	/* OP_MAKE: the last string is for the time namespace's timens_offsets */
	FLAG_SLAVE = 16,	/* OP_MAKE, OP_BIND: what is mounted later in the host's original of a tree is seen in it */
	FLAG_READ_ONLY = 4,	/* OP_BIND; of a bind in OP_MAKE: struct spawner_request.read_only */
	FLAG_SYSLOG = 32,	/* OP_MAKE: syslog(2) is answered by the daemon; else it is denied */
};

enum spawner_feature {
	FEATURE_IDMAPPED_ROOT = 1,	/* the host's root filesystem shows no IDs: its sockets are out of reach */
	FEATURE_REMAPPED_ROOT = 2,	/* a root that has an idmap can be given another (Linux 6.15) */
};

struct map_extent {
	uint32_t inside, outside, count;
};

struct spawner_request {
	uint64_t id;		/* repeated in the reply */
	uint32_t op;		/* enum spawner_op */
	uint32_t flags;		/* enum spawner_flag */
	uint32_t unshare;	/* CLONE_NEW* */
	uint32_t face;
	int32_t pid;		/* OP_MAKE: the parent's init, 0 for the host.  Else: the process in question */
	int32_t target_pid;	/* OP_PIN; 0 for the host.  OP_MAKE: whose root to show if not the parent's, 0: the parent's */
	uint32_t owner_uid, owner_gid;	/* the host's IDs */
	uint32_t uid_extents, gid_extents;
	uint32_t v1_groups;
	uint32_t binds;
	uint64_t read_only;	/* bit n: bind n */
	uint32_t strings;	/* how many strings, each with its NUL, follow the extents */
	uint32_t joins;		/* OP_MAKE: how many namespaces come last among fds, to be joined instead of the parent's */
};

#define MAP_EXTENTS_MAX 340	/* user_namespaces(7) */
#define BINDS_MAX 64
#define V1_GROUPS_MAX 16

struct spawner_reply {
	uint64_t id;
	int32_t error;		/* 0 or -errno */
	uint32_t step;		/* enum step: what failed */
	int32_t pid;		/* the host's */
	uint32_t value;
	char text[128];
};

/* The steps of what can fail; the words for them are in nsfs/spawner.py.  Only ever append. */
enum step {
	STEP_NONE,
	STEP_REQUEST,		/* the message is malformed */
	STEP_LIMIT,		/* memory, descriptors */
	STEP_CLONE,		/* clone3: limits of processes and namespaces, cgroups */
	STEP_JOIN,		/* entering the parent's namespaces */
	STEP_OWNER,		/* the parent's user namespace does not map the owner */
	STEP_MAP,		/* uid_map, gid_map */
	STEP_CGROUP,		/* joining v1 groups, the cgroup namespace */
	STEP_ROOT,		/* the root filesystem's tree */
	STEP_IDMAP,
	STEP_FACE,		/* the filesystem's own files */
	STEP_MOUNT,		/* /proc, /sys, /dev, private directories */
	STEP_BIND,
	STEP_PIVOT,
	STEP_IDENTITY,		/* becoming the container's root */
	STEP_HOSTNAME,
	STEP_NET,		/* network namespace, loopback */
	STEP_EXEC,
	STEP_DEADLINE,		/* it took too long */
	STEP_DIED,		/* it was killed */
	STEP_PROCESS,		/* the process in question is gone */
	STEP_PATH,
	STEP_OUTPUT,
	STEP_STDIO,
	STEP_DIRECTORY,		/* a command's working directory */
	STEP_TERMINAL,
	STEP_CLOCKS,
	STEP_FILTER,		/* seccomp */
	STEP_VIEW,		/* a path leads somewhere else for whoever wrote it */
};

/* --- spawner to init, by argv and descriptors --- */

#define INIT_LISTEN_FD 3
#define INIT_PAYLOAD_FD 4	/* O_PATH of ID/payload */
#define INIT_READY_FD 5		/* takes one struct init_result, then is closed */
#define INIT_CGROUP_NS_FD 6	/* with flag `c`: the cgroup namespace rooted at ID/payload */
/* With flag `l`, and made by the init itself: the listener of its seccomp filter, which has the container's calls of
 * syslog(2).  The daemon gets it by pidfd_getfd(2), each anew; it is not there if the kernel gave none. */
#define INIT_SYSLOG_FD 7

struct init_result {
	int32_t error;		/* 0 or -errno */
	uint32_t step;
};

/* --- anybody who is root outside to an init, on a connection to RUN/c/ID.sock --- */

enum init_op {
	/* Start a command; strings: working directory, argv, environment; fds: its descriptors 0, 1, ...
	 * On this connection comes INIT_STARTED, whose SCM_CREDENTIALS tell the PID; then end-of-file when it
	 * was executed, or INIT_FAILED. */
	INIT_EXEC = 1,
	/* Report how the command `token` ended: INIT_EXITED, as soon as it did; INIT_FAILED with ESRCH for a
	 * token that is not known (any more). */
	INIT_WAIT,
	/* Before the connection is handed to a session program: on it INIT_EXEC is to come with SCM_CREDENTIALS of
	 * the container's root, which the kernel lets only those claim who may become that.  No reply. */
	INIT_PROVE,
	/* After INIT_WAIT: send the signal `token` to the command, or with INIT_GROUP to its process group. */
	INIT_SIGNAL,
	/* As INIT_PROVE, of a connection that is to be handed over to somebody who has proven himself. */
	INIT_GIVE,
	/* Close what was handed over and has not been used, then this connection. */
	INIT_REVOKE,
};

enum init_flag {
	INIT_KEEP_STATUS = 1,	/* remember how it ended until an INIT_WAIT asks */
	INIT_TERMINAL = 2,	/* descriptor 0 becomes the controlling terminal */
	INIT_SAME_SESSION = 4,	/* no setsid(2) */
	/* INIT_EXEC: 0, 1 and 2 are made inside, their other ends come with INIT_OPENED.  Either a terminal, set up as
	 * the struct init_terminal that follows the gids; its other end is one descriptor. */
	INIT_OPEN_TERMINAL = 8,
	/* Or three pipes; the other ends are three descriptors. */
	INIT_OPEN_PIPES = 16,
	INIT_OPEN_ERROR = 32,	/* with INIT_OPEN_TERMINAL: 2 is a pipe, whose other end comes second */
	INIT_SHELL = 64,	/* INIT_EXEC: /bin/sh in place of a program that cannot be executed */
	INIT_HANGUP = 128,	/* INIT_WAIT: SIGHUP to the command's group when the connection ends first */
	INIT_GROUP = 256,	/* INIT_SIGNAL */
};

struct init_terminal {
	uint16_t size[4];	/* struct winsize */
	uint8_t termios[36];	/* the kernel's struct termios; all zero: as it comes */
};

struct init_request {
	uint32_t op;		/* enum init_op */
	uint32_t flags;		/* enum init_flag */
	uint64_t token;		/* the asker's choice, unique for this init */
	uint32_t uid, gid;	/* inside */
	uint32_t groups;	/* how many uint32_t gids follow */
	uint32_t argc, envc;
	uint32_t reserved;
};

enum init_reply_op {
	INIT_STARTED = 1,
	INIT_FAILED,
	INIT_EXITED,
	INIT_OPENED,
};

struct init_reply {
	uint32_t op;		/* enum init_reply_op */
	int32_t error;		/* INIT_FAILED: -errno */
	uint32_t step;		/* INIT_FAILED */
	int32_t status;		/* INIT_EXITED: as wait(2) has it */
};

#define INIT_GROUPS_MAX 64
#define INIT_FDS_MAX 16
#define INIT_ARGS_MAX 4096	/* argv and environment together */

/* --- daemon to a session program, on the channel between them --- */

/* What entering takes.  Whole (types 0) the descriptors are: the container's user namespace, and two connections to
 * its init, for INIT_EXEC and for INIT_WAIT.  In part: the namespaces, in the order of CLONE_NEW*'s bits; then
 * the process that has joined them says so (one byte), and is answered by a second offer.  With ENTRY_SYSLOG there
 * are two more, detached mounts for /dev/kmsg and /proc/kmsg, and the byte comes with the listener of the process's
 * filter for syslog(2); the session program keeps that as descriptor ENTRY_LISTENER_FD.  The container's name
 * follows. */
struct entry_offer {
	int32_t error;		/* 0 or -errno */
	uint32_t types;		/* CLONE_NEW*, ENTRY_SYSLOG */
	uint32_t root_uid, root_gid;	/* the host's IDs of the container's root; ENTRY_NO_PROOF: need not be proven */
	uint64_t token;		/* from the tracer: of the command that it has asked the init for, with INIT_OPEN_PIPES; else 0 */
};

#define ENTRY_NO_PROOF 0xffffffffU
#define ENTRY_SYSLOG 1U
#define ENTRY_LISTENER_FD 255

/* --- daemon to nsfs-uaccess; one request at a time --- */

#define UACCESS_SOCKET_FD 3
#define UACCESS_DATA_FD 4

struct uaccess_request {
	uint64_t id;		/* of the call, as the listener that is sent along has it */
	uint64_t address;
	int64_t value;		/* what the call returns */
	uint32_t tid;		/* the host's */
	uint32_t length;
};

struct uaccess_reply {
	int32_t error;		/* 0: answered with `value`; -EFAULT, -EPERM: answered with that; -ENOENT: gone */
};

/* --- daemon to nsfs-tracer --- */

enum trace_op {
	/* fds first: the session program, the channel; the container's name follows.  Or no channel, and after a NUL the path
	 * of the init's socket: then the tracer itself makes the offer, and may have the init start the shell. */
	TRACE_SESSION = 1,
	TRACE_MOVE,
};

/* The last descriptor that comes with it is where the reply goes; its end without one: the tracer has died.  Before
 * that, with TRACE_SESSION, one byte: whatever the process is answered now, it stops before it sees that. */
#define TRACE_INTERRUPTED 1

struct trace_request {
	uint32_t op;		/* enum trace_op */
	int32_t target;		/* the host's thread ID; its process has no other thread */
	int32_t caller;		/* TRACE_MOVE: with whose credentials it is traced; the target itself: with ours */
	int32_t init;		/* TRACE_MOVE: of the container */
	uint32_t types;		/* TRACE_MOVE: CLONE_NEW* */
	uint32_t reserved;
};

struct trace_reply {
	int32_t error;		/* 0 or -errno */
	uint32_t step;		/* enum step */
	uint32_t stopped_us;	/* how long the target was stopped */
	uint32_t reserved;
};

#endif
