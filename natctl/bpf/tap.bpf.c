/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a managed VM sends is marked as a VM's before nftables sees it, at the
 * ingress of its tap.
 *
 * The rules of nftables take the mark away from what may leave.  So what has
 * it at an uplink has met no rules: somebody flushed them, and natd has not
 * repaired that yet.  The guard (guard.bpf.c) drops it.
 */
#include <linux/pkt_cls.h>

#include "kernel.h"

struct settings {
	__u32 mark;		/* bit that is set in packets of VMs */
};

const volatile struct settings settings = {};

SEC("tc/tap")
int tap(struct __sk_buff *skb)
{
	skb->mark |= settings.mark;
	return TC_ACT_UNSPEC;
}
