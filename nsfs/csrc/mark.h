/* What the BPF program (mark.bpf.c) and its loader (marker.c) agree on.  The loader passes events on
 * as they are; nsfs/marker.py takes them apart. */
#ifndef NSFS_MARK_H
#define NSFS_MARK_H

enum { MARKS = 8, LEVELS = 16, TEXT_BYTES = 1024, NAME_BYTES = 16 };

/* How a mark came about, where it is not the number of a hook (enum nf_inet_hooks). */
enum { MARK_RECEIVE = 16, MARK_BRIDGE = 17 };

/* A packet that some code of the kernel was about to handle. */
struct mark {
	unsigned long long time_ns; /* CLOCK_MONOTONIC */
	unsigned long long net;     /* SO_NETNS_COOKIE */
	unsigned long long skb;
	unsigned char source[16]; /* IPv4 has the first four */
	unsigned char destination[16];
	char in[NAME_BYTES];
	char out[NAME_BYTES];
	unsigned short ports[2]; /* network order; 0 where there are none */
	unsigned int ident;      /* IPv4: ID; IPv6: flow label */
	unsigned int length;     /* of the packet, with its header */
	unsigned char family;    /* NFPROTO_IPV4, _IPV6, _ARP; 0: another or unreadable */
	unsigned char protocol;
	unsigned char kind;
	unsigned char pad;
};

enum { EVENT_LINE = 1, EVENT_MARK = 2 };

/* A line that was printed, or (EVENT_MARK: `marks[0]` only) the mark that followed one. */
struct event {
	unsigned long long time_ns;
	unsigned int kind;
	unsigned int tid; /* of the initial PID namespace */
	unsigned int cpu;
	unsigned int softirq; /* 1 in a softirq: `tid` then says nothing */
	unsigned int marks_used;
	unsigned int length; /* of the text */
	/* IDs of the task's v2 group and of those above it; [0] is the hierarchy's root. */
	unsigned long long groups[LEVELS];
	struct mark marks[MARKS]; /* newest first */
	char text[TEXT_BYTES];
};

#endif
