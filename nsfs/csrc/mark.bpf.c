/* Marks: which network namespace's packet does this CPU, or this task, handle right now?
 *
 * A LOG rule prints from wherever the packet is handled, mostly a softirq in which `current` is
 * anybody.  So each packet that is about to be handled is noted with its namespace, and a line that
 * is printed takes the notes of its context along.  The loader (marker.c) links `mark_hook` to every
 * hook of the namespaces of containers; the other programs are the whole machine's, and do next to
 * nothing for packets of other namespaces.
 *
 * A context is a softirq on a CPU (softirqs do not nest) or a task.  A mark holds from when it is
 * made until its packet is out of the kernel's hands in that context: sent (net_dev_queue), freed
 * (kfree_skb), or another softirq, timer or packet begun.  Inside that span the kernel handles this
 * packet and no other namespace's; that the line's text is about the same packet is checked on top
 * (nsfs/klines.py).  A chain at the lowest priority and a netdev ingress chain run before the hook's
 * mark: the receive mark, or, on output, the mark that follows the line, is theirs.
 *
 * Loads where lockdown is in integrity mode: no kprobe, no fentry.  CO-RE: the kernel's own types are
 * declared as far as they are used. */
#ifdef __bpf__

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef int __s32;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

enum { BPF_MAP_TYPE_HASH = 1, BPF_MAP_TYPE_PERCPU_ARRAY = 6, BPF_MAP_TYPE_LRU_HASH = 9,
       BPF_MAP_TYPE_RINGBUF = 27 };
enum { BPF_NOEXIST = 1 };

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include "mark.h"

enum { NFPROTO_IPV4 = 2, NFPROTO_ARP = 3, NFPROTO_IPV6 = 10 };
enum { IFF_EBRIDGE = 1 << 1 };
enum { NF_INET_LOCAL_OUT = 3, NF_ACCEPT = 1 };
enum { YOUNG_NS = 2000000, FOLLOWS_NS = 2000000 };

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct net {
	__u64 net_cookie;
};
typedef struct {
	struct net *net;
} possible_net_t;
struct net_device {
	char name[NAME_BYTES];
	possible_net_t nd_net;
	__u64 priv_flags;
};
struct sk_buff {
	struct net_device *dev;
	__be16 protocol;
	__u16 network_header;
	unsigned char *head;
	unsigned char *data;
};
struct nf_hook_state {
	__u8 hook;
	__u8 pf;
	struct net_device *in;
	struct net_device *out;
	struct net *net;
};
struct bpf_nf_ctx {
	const struct nf_hook_state *state;
	struct sk_buff *skb;
};
/* Linux before 6.9 has no member priv_flags of 64 bits. */
struct net_device___32 {
	__u32 priv_flags;
};
#pragma clang attribute pop

struct bpf_raw_tracepoint_args {
	__u64 args[0];
};

struct history {
	__u32 used;
	__u32 next;
	__u64 line_ns; /* when the context printed a line that no mark has followed yet */
	__u32 softirq;
	__u32 pad;
	struct mark marks[MARKS];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct history);
} softirqs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct history);
} tasks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct history);
} empty SEC(".maps");

/* The namespaces of containers, by cookie. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, 1); /* BPF_F_NO_PREALLOC */
	__type(key, __u64);
	__type(value, __u32);
} nets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 16 << 20);
} events SEC(".maps");

/* Events that found the ring full. */
__u64 lost;

char LICENSE[] SEC("license") = "GPL";

static __always_inline struct history *of_softirq(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&softirqs, &zero);
}

/* The history of this context; with `make`, a task that has none gets one. */
static __always_inline struct history *of_context(int make)
{
	struct history *history = of_softirq();
	__u32 zero = 0, tid;

	if (!history || history->softirq)
		return history;
	tid = (__u32)bpf_get_current_pid_tgid();
	history = bpf_map_lookup_elem(&tasks, &tid);
	if (history || !make)
		return history;
	history = bpf_map_lookup_elem(&empty, &zero);
	if (!history)
		return 0;
	bpf_map_update_elem(&tasks, &tid, history, BPF_NOEXIST);
	return bpf_map_lookup_elem(&tasks, &tid);
}

static __always_inline void forget(struct history *history)
{
	history->used = 0;
	history->line_ns = 0;
}

static __always_inline struct mark *next_mark(struct history *history)
{
	__u32 at = history->next++ & (MARKS - 1);

	if (history->used < MARKS)
		history->used++;
	return &history->marks[at];
}

static __always_inline void read_packet(struct mark *mark, const void *header)
{
	struct {
		__u8 b[40];
	} ip;
	__u32 offset;

	mark->family = 0;
	mark->protocol = 0;
	mark->ident = mark->length = 0;
	mark->ports[0] = mark->ports[1] = 0;
	if (bpf_probe_read_kernel(&ip, sizeof ip, header))
		return;
	if (ip.b[0] >> 4 == 4) {
		__builtin_memcpy(mark->source, ip.b + 12, 4);
		__builtin_memcpy(mark->destination, ip.b + 16, 4);
		mark->family = NFPROTO_IPV4;
		mark->protocol = ip.b[9];
		mark->length = (__u32)ip.b[2] << 8 | ip.b[3];
		mark->ident = (__u32)ip.b[4] << 8 | ip.b[5];
		/* Ports are in the first fragment. */
		if ((ip.b[6] & 0x1f) | ip.b[7])
			return;
		offset = (ip.b[0] & 15U) * 4;
	} else if (ip.b[0] >> 4 == 6) {
		__builtin_memcpy(mark->source, ip.b + 8, 16);
		__builtin_memcpy(mark->destination, ip.b + 24, 16);
		mark->family = NFPROTO_IPV6;
		mark->protocol = ip.b[6];
		mark->length = ((__u32)ip.b[4] << 8 | ip.b[5]) + 40;
		mark->ident = (ip.b[1] & 15U) << 16 | (__u32)ip.b[2] << 8 | ip.b[3];
		offset = 40;
	} else if (ip.b[0] == 0 && ip.b[1] == 1 && ip.b[2] == 8 && ip.b[3] == 0) {
		/* ARP of IPv4 on Ethernet: its addresses may be martian, too. */
		__builtin_memcpy(mark->source, ip.b + 14, 4);
		__builtin_memcpy(mark->destination, ip.b + 24, 4);
		mark->family = NFPROTO_ARP;
		return;
	} else {
		return;
	}
	/* TCP, UDP, UDP-Lite, SCTP, DCCP. */
	if (mark->protocol == 6 || mark->protocol == 17 || mark->protocol == 136 ||
	    mark->protocol == 132 || mark->protocol == 33)
		bpf_probe_read_kernel(mark->ports, sizeof mark->ports, header + offset);
}

static __always_inline void read_name(char *name, const struct net_device *device)
{
	if (!device || bpf_probe_read_kernel(name, NAME_BYTES, device->name))
		__builtin_memset(name, 0, NAME_BYTES);
}

static __always_inline void tell_follower(struct history *history, const struct mark *mark)
{
	struct event *event = bpf_ringbuf_reserve(&events, __builtin_offsetof(struct event, marks[1]), 0);

	history->line_ns = 0;
	if (!event) {
		__sync_fetch_and_add(&lost, 1);
		return;
	}
	event->time_ns = mark->time_ns;
	event->kind = EVENT_MARK;
	event->tid = (__u32)bpf_get_current_pid_tgid();
	event->cpu = bpf_get_smp_processor_id();
	event->softirq = history->softirq;
	event->marks_used = 1;
	event->length = 0;
	event->marks[0] = *mark;
	bpf_ringbuf_submit(event, 0);
}

SEC("netfilter")
int mark_hook(struct bpf_nf_ctx *context)
{
	const struct nf_hook_state *state = context->state;
	struct sk_buff *skb = context->skb;
	struct history *history = of_context(1);
	struct mark *mark;

	if (!history)
		return NF_ACCEPT;
	mark = next_mark(history);
	mark->time_ns = bpf_ktime_get_ns();
	mark->net = state->net->net_cookie;
	mark->skb = (__u64)skb;
	mark->kind = state->hook;
	read_name(mark->in, state->in);
	read_name(mark->out, state->out);
	read_packet(mark, skb->head + skb->network_header);
	if (history->line_ns) {
		if (mark->kind == NF_INET_LOCAL_OUT && mark->time_ns - history->line_ns < FOLLOWS_NS)
			tell_follower(history, mark);
		history->line_ns = 0;
	}
	return NF_ACCEPT;
}

static __always_inline __u64 cookie_of(const struct net_device *device)
{
	return BPF_CORE_READ(device, nd_net.net, net_cookie);
}

SEC("raw_tp/netif_receive_skb")
int mark_receive(struct bpf_raw_tracepoint_args *context)
{
	const struct sk_buff *skb = (const void *)context->args[0];
	const struct net_device *device = BPF_CORE_READ(skb, dev);
	__u64 cookie = cookie_of(device);
	struct history *history;
	struct mark *mark;

	if (!bpf_map_lookup_elem(&nets, &cookie)) {
		history = of_context(0);
		if (history)
			forget(history);
		return 0;
	}
	history = of_context(1);
	if (!history)
		return 0;
	history->line_ns = 0;
	mark = next_mark(history);
	mark->time_ns = bpf_ktime_get_ns();
	mark->net = cookie;
	mark->skb = (__u64)skb;
	mark->kind = MARK_RECEIVE;
	read_name(mark->in, device);
	__builtin_memset(mark->out, 0, NAME_BYTES);
	/* The link layer's header is off, network_header is not set yet. */
	read_packet(mark, BPF_CORE_READ(skb, data));
	return 0;
}

SEC("raw_tp/net_dev_start_xmit")
int mark_bridge(struct bpf_raw_tracepoint_args *context)
{
	const struct sk_buff *skb = (const void *)context->args[0];
	const struct net_device *device = (const void *)context->args[1];
	struct history *history;
	struct mark *mark;
	__u64 cookie, flags;

	if (bpf_core_field_size(device->priv_flags) == 8)
		flags = BPF_CORE_READ(device, priv_flags);
	else
		flags = BPF_CORE_READ((const struct net_device___32 *)device, priv_flags);
	if (!(flags & IFF_EBRIDGE))
		return 0;
	cookie = cookie_of(device);
	if (!bpf_map_lookup_elem(&nets, &cookie)) {
		history = of_context(0);
		if (history)
			forget(history);
		return 0;
	}
	history = of_context(1);
	if (!history)
		return 0;
	mark = next_mark(history);
	mark->time_ns = bpf_ktime_get_ns();
	mark->net = cookie;
	mark->skb = (__u64)skb;
	mark->kind = MARK_BRIDGE;
	read_name(mark->in, device);
	__builtin_memset(mark->out, 0, NAME_BYTES);
	read_packet(mark, BPF_CORE_READ(skb, head) + BPF_CORE_READ(skb, network_header));
	return 0;
}

/* The packet, or a copy of it, is on its way out: what the context handles next is another. */
SEC("raw_tp/net_dev_queue")
int end_sent(void *context)
{
	struct history *history = of_context(0);

	if (history)
		forget(history);
	return 0;
}

SEC("raw_tp/kfree_skb")
int end_freed(struct bpf_raw_tracepoint_args *context)
{
	struct history *history = of_context(0);
	__u32 at;

	if (!history)
		return 0;
	if (!history->softirq) {
		forget(history);
		return 0;
	}
	/* Packets of a list are handled hook by hook: the others of the list go on. */
	history->line_ns = 0;
	for (at = 0; at < MARKS; at++)
		if (history->marks[at].skb == context->args[0])
			history->marks[at].time_ns = 0;
	return 0;
}

SEC("raw_tp/softirq_entry")
int begin_softirq(void *context)
{
	struct history *history = of_softirq();

	if (history) {
		forget(history);
		history->softirq = 1;
	}
	return 0;
}

SEC("raw_tp/softirq_exit")
int end_softirq(void *context)
{
	struct history *history = of_softirq();

	if (history) {
		forget(history);
		history->softirq = 0;
	}
	return 0;
}

SEC("raw_tp/timer_expire_entry")
int begin_timer(void *context)
{
	struct history *history = of_softirq();

	if (history)
		forget(history);
	return 0;
}

SEC("raw_tp/console")
int line(struct bpf_raw_tracepoint_args *context)
{
	struct history *history = of_context(1);
	struct event *event;
	__u64 length = context->args[1];
	__u32 at, position;

	event = bpf_ringbuf_reserve(&events, sizeof *event, 0);
	if (!event) {
		__sync_fetch_and_add(&lost, 1);
		return 0;
	}
	event->time_ns = bpf_ktime_get_ns();
	event->kind = EVENT_LINE;
	event->tid = (__u32)bpf_get_current_pid_tgid();
	event->cpu = bpf_get_smp_processor_id();
	event->softirq = 0;
	event->marks_used = 0;
	if (length > TEXT_BYTES)
		length = TEXT_BYTES;
	event->length = (__u32)length;
	if (bpf_probe_read_kernel(event->text, (__u32)length, (const void *)context->args[0]))
		event->length = 0;
#pragma unroll
	for (at = 0; at < LEVELS; at++)
		event->groups[at] = bpf_get_current_ancestor_cgroup_id((int)at);
	if (history) {
		event->softirq = history->softirq;
#pragma unroll
		for (at = 0; at < MARKS; at++) {
			if (at >= history->used)
				break;
			position = (history->next - 1 - at) & (MARKS - 1);
			if (event->time_ns - history->marks[position].time_ns < YOUNG_NS) {
				event->marks[at] = history->marks[position];
				event->marks_used = at + 1;
			} else {
				event->marks[at].net = 0;
				event->marks[at].time_ns = 0;
			}
		}
		history->line_ns = event->time_ns;
	}
	bpf_ringbuf_submit(event, 0);
	return 0;
}

#endif
