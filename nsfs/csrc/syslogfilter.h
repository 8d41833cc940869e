/*
 * The seccomp filter for syslog(2): an initializer of struct sock_filter[].
 *
 * Of any other call the kernel finds out beforehand that it is allowed, and remembers (seccomp_cache_prepare()).
 */
#ifndef NSFS_SYSLOGFILTER_H
#define NSFS_SYSLOGFILTER_H

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>

#define SYSLOG_LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define SYSLOG_WHEN(value, then, otherwise) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), (then), (otherwise))

#if defined(__x86_64__)
/* The same number on x86-64 and i386; x32 has it with one bit set. */
#define SYSLOG_FILTER(action)						\
	SYSLOG_LOAD(nr),						\
	BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xbfffffff),		\
	SYSLOG_WHEN(103, 0, 1),						\
	BPF_STMT(BPF_RET | BPF_K, (action)),				\
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#elif defined(__aarch64__)
#define SYSLOG_FILTER(action)						\
	SYSLOG_LOAD(arch),						\
	SYSLOG_WHEN(AUDIT_ARCH_ARM, 0, 2),				\
	SYSLOG_LOAD(nr),						\
	SYSLOG_WHEN(103, 2, 3),						\
	SYSLOG_LOAD(nr),						\
	SYSLOG_WHEN(116, 0, 1),						\
	BPF_STMT(BPF_RET | BPF_K, (action)),				\
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#else
#error "the system-call numbers of this architecture are not known"
#endif

#endif
