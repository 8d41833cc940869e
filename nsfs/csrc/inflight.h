/*
 * inflight.h - the memfd of requests in flight.
 *
 * The supervisor creates it and keeps it from daemon to daemon; the interposer in the daemon records
 * in it each request from before the kernel considers it delivered until after it was answered.
 * So a daemon may be killed at any instant: the next one finds what was under way.
 *
 * The supervisor only ever uses pread(2) and pwrite(2) on it (a mapping could be taken from under it).
 * nsfs/takeover.py reads the head by the offsets asserted below.
 */
#ifndef NSFS_INFLIGHT_H
#define NSFS_INFLIGHT_H

#include <stddef.h>
#include <stdint.h>

#define INFLIGHT_MAGIC 0x3273666eU	/* "nfs2"; another layout gets another number */
#define INFLIGHT_SLOTS 16384U
/* Slots from which READ is refused: only reads are parked for long, and the rest (an rm -rf that
 * shall end them, say) must go on working when very many are. */
#define INFLIGHT_RESERVE 1024U
/* What the kernel is told in the INIT reply; it asks for room for a header beside it. */
#define INFLIGHT_MAX_WRITE 65536U
#define INFLIGHT_SLOT_BYTES (INFLIGHT_MAX_WRITE + 4096U)

struct inflight_request {
	uint64_t unique;
	uint64_t nodeid;
	uint32_t opcode;
	uint32_t pid;			/* a thread's ID, as the host knows it */
	uint32_t uid;
	uint32_t gid;
	uint8_t replayed;		/* an earlier daemon was given it too */
	uint8_t fills_page;		/* a READ for the page cache */
	uint8_t padding[6];
};

struct inflight_head {
	/* Written by the supervisor, before it starts a daemon. */
	uint32_t magic;
	uint32_t generation;		/* daemons started, this one included */
	uint32_t crashes;		/* of those, the last ones that died early by their own fault */
	/* Written by the interposer. */
	uint32_t attached;		/* PID of the process it is loaded in */
	uint32_t serving;		/* PID, once it serves that process's FUSE session */
	uint32_t takeover;		/* 1: an earlier daemon answered the kernel's INIT */
	int32_t interrupt_fd;		/* read end: the unique of each interrupted request */
	uint32_t init_bytes;		/* 0: the kernel's INIT was not read yet */
	struct inflight_request current; /* the one last handed to libfuse */
	uint8_t init[1024];		/* the kernel's INIT request */
};

_Static_assert(sizeof(struct inflight_request) == 40, "takeover.py");
_Static_assert(offsetof(struct inflight_head, current) == 32, "takeover.py");
_Static_assert(sizeof(struct inflight_head) <= 4096, "one page");

/* The head; then for each slot the bytes recorded in it (uint32_t, 0: free); then the landing, which
 * the kernel writes into; then the slots; then the handles of those who poll.  Sparse: only what was
 * touched costs memory. */
#define INFLIGHT_USED 4096U
#define INFLIGHT_LANDING (INFLIGHT_USED + INFLIGHT_SLOTS * 4U)
#define INFLIGHT_FIRST_SLOT (INFLIGHT_LANDING + INFLIGHT_SLOT_BYTES)
#define INFLIGHT_FIRST_POLL (INFLIGHT_FIRST_SLOT + (uint64_t)INFLIGHT_SLOTS * INFLIGHT_SLOT_BYTES)
#define INFLIGHT_POLLS 4096U
#define INFLIGHT_BYTES (INFLIGHT_FIRST_POLL + INFLIGHT_POLLS * sizeof(uint64_t))

/* An LSEEK handed over as a READ: in its offset are whence and, below, where to. */
#define INFLIGHT_WHENCE_SHIFT 56

#endif
