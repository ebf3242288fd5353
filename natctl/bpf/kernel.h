/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What programs of ours use of the kernel: sections, helpers, byte order.
 *
 * The few lines that are needed of libbpf's headers, so that a build needs
 * clang and the kernel's headers only.
 */
#ifndef VIRT_PORTS_KERNEL_H
#define VIRT_PORTS_KERNEL_H

#include <linux/bpf.h>
#include <linux/types.h>

#define SEC(name)	__attribute__((section(name), used))
#undef __always_inline	/* linux/stddef.h: no more than a wish */
#define __always_inline	inline __attribute__((always_inline))
#define offsetof(type, member)	__builtin_offsetof(type, member)

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define ntohs(value)	__builtin_bswap16(value)
#define ntohl(value)	__builtin_bswap32(value)
#define constant_htons(value)	((__be16)((((value) & 0xff) << 8) | ((value) >> 8)))
#else
#define ntohs(value)	(value)
#define ntohl(value)	(value)
#define constant_htons(value)	((__be16)(value))
#endif

#define AF_INET	2

/* The helpers' numbers: enum bpf_func_id in linux/bpf.h. */
static __u32 (*const bpf_get_hash_recalc)(struct __sk_buff *skb) = (void *)BPF_FUNC_get_hash_recalc;
static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*const bpf_l4_csum_replace)(struct __sk_buff *skb, __u32 offset, __u64 from, __u64 to,
					 __u64 flags) = (void *)BPF_FUNC_l4_csum_replace;
static long (*const bpf_skb_pull_data)(struct __sk_buff *skb, __u32 len) = (void *)BPF_FUNC_skb_pull_data;
static long (*const bpf_skb_load_bytes_relative)(const void *skb, __u32 offset, void *to, __u32 len,
						 __u32 start) = (void *)BPF_FUNC_skb_load_bytes_relative;
static long (*const bpf_fib_lookup)(void *ctx, struct bpf_fib_lookup *params, int size,
				    __u32 flags) = (void *)BPF_FUNC_fib_lookup;
static long (*const bpf_redirect_neigh)(__u32 ifindex, struct bpf_redir_neigh *params, int size,
					__u64 flags) = (void *)BPF_FUNC_redirect_neigh;

/* As the loader reads it (natctl/bpf/elf.py); it may choose another number of entries. */
struct map {
	__u32 type, key_size, value_size, entries, flags;
};

#define MAP(name)	struct map name SEC("maps")

char license_[] SEC("license") = "Dual BSD/GPL";

#endif
