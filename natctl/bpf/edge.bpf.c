/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The edge's fast path, at the ingress of its uplinks and of its interfaces
 * to the hosts.
 *
 * All of a packet is done here, or nothing: it is translated, routed and sent,
 * or it goes on untouched to the rules of nftables, which know every kind of
 * packet.  Those alone drop anything.  So what is rare or irregular is not
 * here: fragments, IP options, ICMP errors, packets that expire or do not fit,
 * addresses of this machine, next hops that are no neighbours.
 *
 * One table decides both directions.  A word for each external port says whose
 * it is, so there is no moment at which a port leads to one VM and from
 * another, and a change is a store.
 *
 * Byte order: what is compared with headers has that of the network.
 */
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#include "kernel.h"

#define L3		ETH_HLEN
#define L4		(ETH_HLEN + sizeof(struct iphdr))
#define HEADERS		(L4 + sizeof(struct udphdr))
#define MORE_FRAGMENTS	0x2000
#define OFFSET		0x1fff
#define MAX_INTERFACES	8
#define BY_MARK		32	/* BPF_FIB_LOOKUP_MARK: older headers do not have it */

enum icmp_query { ECHO_REPLY = 0, ECHO_REQUEST = 8, TIMESTAMP = 13, TIMESTAMP_REPLY = 14 };

/* Set before the program is loaded, and constant from then on: the verifier takes them as numbers. */
struct settings {
	__be32 pool, mask;		/* of the VMs' internal addresses */
	__u32 lowest, span;		/* no external address is below, or further above than that */
	__u32 checks_senders;		/* whether a VM's packet must come from its host */
	__u32 lookup_flags;		/* of bpf_fib_lookup() */
	__u32 uplinks[MAX_INTERFACES];	/* 0: no more */
	__u32 underlay[MAX_INTERFACES];
};

const volatile struct settings settings = {};

#define PORTS_PER_LINE	16
#define LINES_PER_ADDRESS	(65536 / PORTS_PER_LINE)
#define HOMES_PER_LINE	8

/* Elements of a cache line: an element for each word would take 8 bytes. */
struct owners {
	__be32 of[PORTS_PER_LINE];	/* internal address; 0: nobody's, or not known here */
};

/* Where an internal address has ports: while it moves to another external address, on both. */
struct home {
	__u16 slot[2];			/* number of the external address, 1 and up; 0: none */
	__u16 host;			/* that sends its packets; 0: none */
	__u16 reserved;
};

struct homes {
	struct home of[HOMES_PER_LINE];
};

struct host {
	__u64 hardware[2];		/* as 8 bytes, the last two 0; 0: none */
};

MAP(owners) = { BPF_MAP_TYPE_ARRAY, sizeof(__u32), sizeof(struct owners), LINES_PER_ADDRESS, BPF_F_MMAPABLE };
MAP(homes) = { BPF_MAP_TYPE_ARRAY, sizeof(__u32), sizeof(struct homes), 1, BPF_F_MMAPABLE };
MAP(hosts) = { BPF_MAP_TYPE_ARRAY, sizeof(__u32), sizeof(struct host), 1, BPF_F_MMAPABLE };
MAP(slots) = { BPF_MAP_TYPE_HASH, sizeof(__be32), sizeof(__u32), 1, 0 };
MAP(addresses) = { BPF_MAP_TYPE_ARRAY, sizeof(__u32), sizeof(__be32), 1, 0 };	/* by slot */
MAP(passed) = { BPF_MAP_TYPE_PERCPU_ARRAY, sizeof(__u32), sizeof(__u64), 1, 0 };

struct packet {
	__be32 saddr, daddr;		/* as it came */
	__be32 new_saddr, new_daddr;	/* as it goes */
	__u16 sport, dport;		/* numbers; of an ICMP query: its identifier, twice */
	__u16 length;			/* of the longest packet that it becomes */
	__u8 protocol, tos;
	__u8 is_request;		/* a query of ICMP that is no answer */
	__u8 is_for_vm;
	__u64 sender;			/* hardware address, as in struct host */
};

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* What a sum gains when one address takes the place of another (RFC 1624). */
static __always_inline __u32 difference(__be32 from, __be32 to)
{
	return (~from & 0xffff) + (~from >> 16) + (to & 0xffff) + (to >> 16);
}

static __always_inline int is_intact(const struct iphdr *ip)
{
	const __u32 *word = (const __u32 *)ip;
	__u64 sum = 0;

#pragma unroll
	for (int i = 0; i < 5; i++)
		sum += word[i];
	sum = (sum & 0xffffffff) + (sum >> 32);
	return fold((sum & 0xffff) + (sum >> 16)) == 0xffff;
}

/* 0/8, 127/8, multicast, broadcast: what a router does not pass, whatever its routes say. */
static __always_inline int is_martian(__be32 address)
{
	__u8 first = ntohl(address) >> 24;

	return first == 0 || first == 127 || first >= 224;
}

static __always_inline int is_one_of(__u32 ifindex, const volatile __u32 interfaces[MAX_INTERFACES])
{
#pragma unroll
	for (int i = 0; i < MAX_INTERFACES; i++)
		if (interfaces[i] == ifindex)
			return 1;
	return 0;
}

/* The bytes on the wire of the longest packet that an aggregated one becomes; 0: not known. */
static __always_inline __u16 segment_length(__u32 gso_size, __u8 protocol, void *l4, void *end)
{
	struct tcphdr *tcp = l4;

	if (protocol != IPPROTO_TCP)
		return sizeof(struct iphdr) + sizeof(struct udphdr) + gso_size;
	if ((void *)(tcp + 1) > end)
		return 0;
	return sizeof(struct iphdr) + tcp->doff * 4 + gso_size;
}

static __always_inline int read_ports(struct packet *p, const void *l4)
{
	const __be16 *half = l4;
	__u8 type = *(const __u8 *)l4;

	switch (p->protocol) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
	case IPPROTO_SCTP:
		p->sport = ntohs(half[0]);
		p->dport = ntohs(half[1]);
		return 1;
	case IPPROTO_ICMP:
		p->is_request = type == ECHO_REQUEST || type == TIMESTAMP;
		if (!p->is_request && type != ECHO_REPLY && type != TIMESTAMP_REPLY)
			return 0;
		p->sport = p->dport = ntohs(half[2]);
		return 1;
	}
	return 0;
}

static __always_inline int read_packet(struct __sk_buff *skb, struct packet *p)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ethhdr *eth;
	struct iphdr *ip;
	void *l4;

	if (data + HEADERS > end) {
		if (bpf_skb_pull_data(skb, HEADERS))
			return 0;
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
		if (data + HEADERS > end)
			return 0;
	}
	eth = data;
	ip = data + L3;
	l4 = data + L4;
	if (eth->h_proto != constant_htons(ETH_P_IP) || *(__u8 *)ip != 0x45)
		return 0;
	if (ip->frag_off & constant_htons(MORE_FRAGMENTS | OFFSET) || ip->ttl <= 1 || !is_intact(ip))
		return 0;
	if (is_martian(ip->saddr) || is_martian(ip->daddr))
		return 0;
	p->protocol = ip->protocol;
	p->tos = ip->tos;
	p->saddr = p->new_saddr = ip->saddr;
	p->daddr = p->new_daddr = ip->daddr;
	if (skb->gso_size) {
		p->length = segment_length(skb->gso_size, ip->protocol, l4, end);
		if (!p->length)
			return 0;
	} else {
		p->length = ntohs(ip->tot_len);
		if (p->length < sizeof(*ip) + (ip->protocol == IPPROTO_TCP ? sizeof(struct tcphdr) : 8) ||
		    p->length + L3 > skb->len)
			return 0;
	}
	__builtin_memcpy(&p->sender, eth->h_source, ETH_ALEN);
	return read_ports(p, l4);
}

static __always_inline __be32 owner(__u32 slot, __u16 port)
{
	__u32 line = (slot - 1) * LINES_PER_ADDRESS + port / PORTS_PER_LINE;
	struct owners *owners_ = bpf_map_lookup_elem(&owners, &line);

	return owners_ ? owners_->of[port % PORTS_PER_LINE] : 0;
}

static __always_inline __u32 slot_of(__be32 external)
{
	__u32 *slot;

	if (ntohl(external) - settings.lowest > settings.span)
		return 0;
	slot = bpf_map_lookup_elem(&slots, &external);
	return slot ? *slot : 0;
}

static __always_inline int is_from_its_host(const struct packet *p, __u32 number)
{
	struct host *host;

	if (!settings.checks_senders)
		return 1;
	host = bpf_map_lookup_elem(&hosts, &number);
	return host && number && (host->hardware[0] == p->sender || host->hardware[1] == p->sender);
}

/* A VM sends: 1 when it owns the port, and the host that has it sent this. */
static __always_inline int translate_source(struct packet *p)
{
	__u32 number = ntohl(p->saddr) & ~ntohl(settings.mask);
	__u32 line = number / HOMES_PER_LINE, slot;
	struct homes *homes_ = bpf_map_lookup_elem(&homes, &line);
	struct home home;
	__be32 *external;

	if (!homes_)
		return 0;
	home = homes_->of[number % HOMES_PER_LINE];
	if (!is_from_its_host(p, home.host))
		return 0;
	slot = home.slot[0];
	if (owner(slot, p->sport) != p->saddr) {
		slot = home.slot[1];
		if (owner(slot, p->sport) != p->saddr)
			return 0;
	}
	external = bpf_map_lookup_elem(&addresses, &slot);
	if (!external)
		return 0;
	p->new_saddr = *external;
	return 1;
}

/* Find out what becomes of the addresses; 0: that is not for us to say. */
static __always_inline int translate(struct __sk_buff *skb, struct packet *p)
{
	__u32 slot = slot_of(p->daddr);

	p->is_for_vm = slot != 0;
	if ((p->saddr & settings.mask) == settings.pool && is_one_of(skb->ifindex, settings.underlay)) {
		/* A ping from VM to VM, and what a VM sends to an internal address. */
		if ((slot && p->protocol == IPPROTO_ICMP) || (p->daddr & settings.mask) == settings.pool)
			return 0;
		if (!translate_source(p))
			return 0;
	} else if (!slot) {
		return 0;
	}
	if (!slot)
		return 1;
	/* Somebody may ping this machine by an address that VMs have ports of; a VM gets answers only. */
	if (p->is_request)
		return 0;
	p->new_daddr = owner(slot, p->dport);
	return p->new_daddr != 0;
}

/* Find the next hop; 0: none to which a packet can go from here. */
static __always_inline __u32 route(struct __sk_buff *skb, const struct packet *p, __be32 *next_hop)
{
	struct bpf_fib_lookup fib = {};
	long result;

	fib.family = AF_INET;
	fib.l4_protocol = p->protocol;
	fib.tot_len = p->length;
	fib.ifindex = skb->ifindex;
	fib.tos = p->tos;
	/* Rules see what they see without us: the destination translated, the source not, unless both are. */
	fib.ipv4_src = p->is_for_vm ? p->new_saddr : p->saddr;
	fib.ipv4_dst = p->new_daddr;
	/* Where the mark is, older headers have the hardware address only (BPF_FIB_LOOKUP_MARK, Linux 6.10). */
	if (settings.lookup_flags & BY_MARK)
		*(__u32 *)fib.smac = skb->mark;
	result = bpf_fib_lookup(skb, &fib, sizeof(fib), settings.lookup_flags);
	/* Without an entry for the neighbour, bpf_redirect_neigh() asks for it. */
	if (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH)
		return 0;
	if (fib.family != AF_INET)
		return 0;
	if (!is_one_of(fib.ifindex, p->is_for_vm ? settings.underlay : settings.uplinks))
		return 0;
	*next_hop = fib.ipv4_dst;
	return fib.ifindex;
}

/* 0: the packet is rewritten, else it must not go anywhere. */
static __always_inline int rewrite(struct __sk_buff *skb, const struct packet *p)
{
	__u32 delta = difference(p->saddr, p->new_saddr) + difference(p->daddr, p->new_daddr);
	void *data, *end;
	struct iphdr *ip;

	/* The helper knows whether the checksum is complete, or left to the interface that sends the packet. */
	if (p->protocol != IPPROTO_ICMP && p->protocol != IPPROTO_SCTP) {
		__u32 at = L4 + (p->protocol == IPPROTO_TCP ? offsetof(struct tcphdr, check)
							    : offsetof(struct udphdr, check));
		__u64 flags = BPF_F_PSEUDO_HDR | sizeof(__be32);

		if (p->protocol == IPPROTO_UDP)
			flags |= BPF_F_MARK_MANGLED_0;
		if (p->saddr != p->new_saddr && bpf_l4_csum_replace(skb, at, p->saddr, p->new_saddr, flags))
			return -1;
		if (p->daddr != p->new_daddr && bpf_l4_csum_replace(skb, at, p->daddr, p->new_daddr, flags))
			return -1;
	}
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	if (data + L4 > end)
		return -1;
	ip = data + L3;
	ip->saddr = p->new_saddr;
	ip->daddr = p->new_daddr;
	ip->ttl--;
	/* One less in the upper half of a word of the network's order. */
	ip->check = ~fold((~ip->check & 0xffff) + delta + constant_htons(0xfeff));
	return 0;
}

SEC("tc/edge")
int edge(struct __sk_buff *skb)
{
	struct bpf_redir_neigh hop = {};
	struct packet p = {};
	__u32 zero = 0, ifindex;
	__u64 *packets;

	if (skb->pkt_type != PACKET_HOST || skb->vlan_present)
		return TC_ACT_UNSPEC;
	if (!read_packet(skb, &p) || !translate(skb, &p))
		return TC_ACT_UNSPEC;
	ifindex = route(skb, &p, &hop.ipv4_nh);
	if (!ifindex)
		return TC_ACT_UNSPEC;
	if (rewrite(skb, &p))
		return TC_ACT_SHOT;
	packets = bpf_map_lookup_elem(&passed, &zero);
	if (packets)
		++*packets;
	hop.nh_family = AF_INET;
	return bpf_redirect_neigh(ifindex, &hop, sizeof(hop), 0);
}
