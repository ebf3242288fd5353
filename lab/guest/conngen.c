/*
 * conngen - opens many connections from one process, and is the other side of them too.
 *
 *   conngen -l PORT                    serve TCP and UDP until SIGTERM: answer every connection and every datagram
 *                                      with "ADDRESS PORT\n", the peer as seen here, then echo
 *     -w FILE    of TCP connections, answer the first line instead, and append a line to FILE when they end (when we
 *                end: for all that are still open): "BEGIN END ADDRESS PORT NAME", times in seconds since 1970 and
 *                NAME the first line
 *   conngen [options] ADDRESS PORT N   open N connections, print one line, exit 0 when all succeeded, else 2
 *     -u         UDP: one datagram per socket, which counts when its answer has come
 *     -r RATE    connections per second at most; 0 (default) as fast as possible, at most 256 waiting for an answer
 *     -b BURST   so many at once, then wait until the rate allows as many again; default 1
 *     -n NAME    say this line first, be answered after that (the other side runs with -w)
 *     -e PERIOD  on every open connection say a byte every PERIOD seconds, and the next one only when it came back
 *     -t HOLD    keep them open for HOLD seconds afterwards; -1 until SIGTERM
 *     -c         close each one as soon as it has been answered
 *     -R         close with RST, so that no TIME_WAIT stays
 *     -p P0-P1   bind local ports P0 to P1 in turn; default: the kernel picks
 *     -k         before the end, send a byte on every open connection and see that it comes back: alive= dead=
 *     -T LIMIT   seconds after which a connection without an answer has failed; default 5
 *     -C         print a line each second as well
 *
 * The line: ok= fail= refused= timeout= noport= other= late= secs= extmin= extmax= extports= [alive= dead=] where late
 * of the TCP connections needed more than one SYN, and ext* tell which ports the server saw, that is, ports after
 * translation: lowest, highest, how many. A connection that ended or fell silent under -e is dead.
 *
 * Static and without dependencies, so that it runs in the tiny guest.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_SOCKETS (1 << 17)
#define MAX_WAITING 256
#define EVENTS 256
#define NAME 32

struct options {
	bool udp, close_at_once, reset, verbose, check;
	double rate, hold, limit, period;
	int first_port, last_port, burst;
	const char *name;
	struct sockaddr_in server;
	long wanted;
};

struct tally {
	long started, waiting, ok, refused, timeout, noport, other, late;
	int ext_min, ext_max, ext_ports;
	bool ext_seen[65536];
};

static volatile sig_atomic_t stopped;
static struct tally tally = {.ext_min = 65536};
static double waiting_since[MAX_SOCKETS]; /* 0: this descriptor waits for nothing */
static bool established[MAX_SOCKETS];
static bool silent[MAX_SOCKETS]; /* what was said there has not come back yet */
static int highest_fd;

static void stop(int signal_number)
{
	(void)signal_number;
	stopped = 1;
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void watch(int epoll, int fd, unsigned events)
{
	struct epoll_event event = {.events = events, .data.fd = fd};
	epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

static void watch_instead(int epoll, int fd, unsigned events)
{
	struct epoll_event event = {.events = events, .data.fd = fd};
	epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event);
}

static int name_peer(char *text, size_t size, const struct sockaddr_in *peer)
{
	return snprintf(text, size, "%s %d\n", inet_ntoa(peer->sin_addr), ntohs(peer->sin_port));
}

/* ---- server ---------------------------------------------------------------------------------------------- */

static struct record {
	double begin;
	struct sockaddr_in peer;
	char name[NAME];
} records[MAX_SOCKETS]; /* of open connections, by descriptor; begin is 0 where there is none */
static FILE *recording;

static double time_of_day(void)
{
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static bool greet(int fd, const struct sockaddr_in *peer)
{
	char text[64];

	return write(fd, text, name_peer(text, sizeof text, peer)) >= 0;
}

static void end_record(int fd)
{
	struct record *record = &records[fd];

	if (record->begin)
		fprintf(recording, "%.6f %.6f %s %d %s\n", record->begin, time_of_day(), inet_ntoa(record->peer.sin_addr),
		        ntohs(record->peer.sin_port), record->name[0] ? record->name : "-");
	record->begin = 0;
}

static void end_connection(int fd)
{
	if (recording)
		end_record(fd);
	close(fd);
}

static bool begin_record(int fd, const struct sockaddr_in *peer)
{
	if (fd >= MAX_SOCKETS)
		return false;
	records[fd] = (struct record){.begin = time_of_day(), .peer = *peer};
	return true;
}

/* Returns whether the peer said its name in one piece, as it does, and got its answer. */
static bool take_name(int fd, const char *text, ssize_t size)
{
	struct record *record = &records[fd];

	if (size < 2 || size > NAME || text[size - 1] != '\n')
		return false;
	memcpy(record->name, text, size - 1);
	return greet(fd, &record->peer);
}

static long accept_all(int epoll, int listener)
{
	struct sockaddr_in peer;
	socklen_t size = sizeof peer;
	long accepted = 0;
	int fd;

	while ((fd = accept4(listener, (void *)&peer, &size, SOCK_NONBLOCK)) >= 0) {
		accepted++;
		if (!(recording ? begin_record(fd, &peer) : greet(fd, &peer)))
			close(fd);
		else
			watch(epoll, fd, EPOLLIN);
		size = sizeof peer;
	}
	return accepted;
}

static long answer_datagrams(int fd)
{
	struct sockaddr_in peer;
	socklen_t size = sizeof peer;
	char text[2048];
	long answered = 0;

	while (recvfrom(fd, text, sizeof text, 0, (void *)&peer, &size) >= 0) {
		answered++;
		sendto(fd, text, name_peer(text, sizeof text, &peer), 0, (void *)&peer, size);
		size = sizeof peer;
	}
	return answered;
}

static void echo(int fd)
{
	char text[2048];
	ssize_t got = read(fd, text, sizeof text);

	if (got < 0 && errno == EAGAIN)
		return;
	if (got > 0 && recording && !records[fd].name[0]) {
		if (!take_name(fd, text, got))
			end_connection(fd);
	} else if (got <= 0 || write(fd, text, got) < 0)
		end_connection(fd);
}

static int serve(int port)
{
	struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(port)};
	int tcp = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), udp = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
	int epoll = epoll_create1(0), one = 1, room = 4 << 20;
	struct epoll_event events[EVENTS];
	long total = 0;

	setsockopt(tcp, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	setsockopt(udp, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
	if (bind(tcp, (void *)&any, sizeof any) || listen(tcp, 4096) || bind(udp, (void *)&any, sizeof any)) {
		perror("conngen: cannot listen");
		return 1;
	}
	watch(epoll, tcp, EPOLLIN);
	watch(epoll, udp, EPOLLIN);
	puts("listening");
	fflush(stdout);
	while (!stopped) {
		int n = epoll_wait(epoll, events, EVENTS, 1000);
		for (int i = 0; i < n; i++) {
			int fd = events[i].data.fd;
			if (fd == tcp)
				total += accept_all(epoll, tcp);
			else if (fd == udp)
				total += answer_datagrams(udp);
			else
				echo(fd);
		}
	}
	for (int fd = 0; recording && fd < MAX_SOCKETS; fd++)
		end_record(fd);
	if (recording && fclose(recording)) {
		perror("conngen: cannot write the records");
		return 1;
	}
	printf("accepted=%ld\n", total);
	return 0;
}

/* ---- client ---------------------------------------------------------------------------------------------- */

static void count_failure(int error)
{
	if (error == ECONNREFUSED)
		tally.refused++;
	else if (error == ETIMEDOUT)
		tally.timeout++;
	else if (error == EADDRNOTAVAIL || error == EADDRINUSE || error == EAGAIN || error == EMFILE)
		tally.noport++;
	else
		tally.other++;
}

static int bind_next(int fd, const struct options *options)
{
	static int next;
	struct sockaddr_in local = {.sin_family = AF_INET};
	int one = 1;

	if (!options->first_port)
		return 0;
	if (next < options->first_port || next > options->last_port)
		next = options->first_port;
	local.sin_port = htons(next++);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	return bind(fd, (void *)&local, sizeof local);
}

/* Returns the descriptor of a connection under way, or -1 with errno set. */
static int open_one(const struct options *options)
{
	int fd = socket(AF_INET, (options->udp ? SOCK_DGRAM : SOCK_STREAM) | SOCK_NONBLOCK, 0);

	if (fd < 0)
		return -1;
	if (fd >= MAX_SOCKETS)
		errno = EMFILE;
	else if (!bind_next(fd, options) &&
	         (!connect(fd, (void *)&options->server, sizeof options->server) || errno == EINPROGRESS) &&
	         (!options->udp || write(fd, "x", 1) == 1))
		return fd;
	int error = errno;
	close(fd);
	errno = error;
	return -1;
}

static void start_one(int epoll, const struct options *options)
{
	int fd = open_one(options);

	tally.started++;
	if (fd < 0) {
		count_failure(errno);
		return;
	}
	watch(epoll, fd, options->name ? EPOLLIN | EPOLLOUT : EPOLLIN);
	tally.waiting++;
	waiting_since[fd] = now();
	silent[fd] = false;
	if (fd > highest_fd)
		highest_fd = fd;
}

static void note_external_port(const char *answer)
{
	int port;

	if (sscanf(answer, "%*s %d", &port) != 1 || port < 0 || port > 65535)
		return;
	if (port < tally.ext_min)
		tally.ext_min = port;
	if (port > tally.ext_max)
		tally.ext_max = port;
	tally.ext_ports += !tally.ext_seen[port];
	tally.ext_seen[port] = true;
}

static void finish(int fd, bool reset)
{
	struct linger at_once = {1, 0};

	if (reset)
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
	close(fd);
}

/* To be called before we send anything: what was sent twice until now is the SYN. */
static void see_whether_late(int fd)
{
	struct tcp_info info = {0};
	socklen_t size = sizeof info;

	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0)
		tally.late += info.tcpi_total_retrans > 0;
}

static void take_connection(int epoll, int fd, const struct options *options)
{
	watch_instead(epoll, fd, EPOLLIN);
	see_whether_late(fd);
	dprintf(fd, "%s\n", options->name);
}

static void take_answer(int epoll, int fd, const struct options *options)
{
	char text[128];
	ssize_t got = read(fd, text, sizeof text - 1);

	if (got < 0 && errno == EAGAIN)
		return;
	waiting_since[fd] = 0;
	tally.waiting--;
	if (got <= 0) {
		count_failure(got < 0 ? errno : ECONNRESET);
		close(fd);
		return;
	}
	text[got] = 0;
	tally.ok++;
	if (!options->name)
		see_whether_late(fd);
	note_external_port(text);
	established[fd] = !options->close_at_once;
	if (options->close_at_once)
		finish(fd, options->reset);
	else if (!options->period)
		epoll_ctl(epoll, EPOLL_CTL_DEL, fd, 0);
}

static void lose(int fd)
{
	established[fd] = false;
	close(fd);
}

static void take_echo(int fd)
{
	char text[128];
	ssize_t got = read(fd, text, sizeof text);

	if (got > 0)
		silent[fd] = false;
	else if (got == 0 || errno != EAGAIN)
		lose(fd);
}

static void take_event(int epoll, const struct epoll_event *event, const struct options *options)
{
	int fd = event->data.fd;

	if (established[fd])
		take_echo(fd);
	else if (event->events & EPOLLOUT && !(event->events & EPOLLERR))
		take_connection(epoll, fd, options);
	else
		take_answer(epoll, fd, options);
}

/* Says a byte on every open connection that is not silent. */
static void talk(void)
{
	for (int fd = 0; fd <= highest_fd; fd++)
		if (established[fd] && !silent[fd]) {
			silent[fd] = true;
			if (write(fd, "e", 1) != 1)
				lose(fd);
		}
}

static void give_up_on_late(double limit)
{
	double oldest = now() - limit;

	for (int fd = 0; fd <= highest_fd; fd++)
		if (waiting_since[fd] && waiting_since[fd] < oldest) {
			waiting_since[fd] = 0;
			tally.waiting--;
			tally.timeout++;
			close(fd);
		}
}

static long failures(void)
{
	return tally.refused + tally.timeout + tally.noport + tally.other;
}

/* Returns how many of the open connections still carry a byte there and back. */
static long count_alive(int epoll, double limit)
{
	double deadline = now() + limit;
	struct epoll_event events[EVENTS];
	long asked = 0, alive = 0, dead = 0;
	char text[128];

	for (int fd = 0; fd <= highest_fd; fd++)
		if (established[fd] && (silent[fd] || write(fd, "k", 1) == 1)) {
			watch(epoll, fd, EPOLLIN);
			asked++;
		}
	while (alive + dead < asked && now() < deadline) {
		int n = epoll_wait(epoll, events, EVENTS, 50);
		for (int i = 0; i < n; i++) {
			int fd = events[i].data.fd;
			if (!established[fd])
				continue;
			if (read(fd, text, sizeof text) > 0)
				alive++;
			else
				dead++;
			established[fd] = false;
			epoll_ctl(epoll, EPOLL_CTL_DEL, fd, 0);
		}
	}
	return alive;
}

/*
 * What a held-up process missed is made up for a tenth of a second at most: on a machine that is busy elsewhere a rate
 * must not become a burst.
 */
struct pace {
	double at, saved;
	int left;
};

static void save_up(struct pace *pace, const struct options *options)
{
	double at = now(), most = options->burst + options->rate * 0.1;

	pace->saved += options->rate * (at - pace->at);
	if (pace->saved > most)
		pace->saved = most;
	pace->at = at;
}

static bool may_start(struct pace *pace, const struct options *options)
{
	if (options->rate <= 0)
		return true;
	if (!pace->left && pace->saved >= options->burst) {
		pace->saved -= options->burst;
		pace->left = options->burst;
	}
	return pace->left && pace->left--;
}

static int generate(const struct options *options)
{
	int epoll = epoll_create1(0);
	double begin = now(), end = 0, last_look = begin, last_talk = begin;
	struct pace pace = {.at = begin, .saved = options->burst};
	struct epoll_event events[EVENTS];

	while (!stopped) {
		save_up(&pace, options);
		while (tally.started < options->wanted && tally.waiting < MAX_WAITING && may_start(&pace, options))
			start_one(epoll, options);
		int n = epoll_wait(epoll, events, EVENTS, 20);
		for (int i = 0; i < n; i++)
			take_event(epoll, &events[i], options);
		if (options->period && now() - last_talk > options->period) {
			last_talk = now();
			talk();
		}
		if (now() - last_look > 1) {
			last_look = now();
			give_up_on_late(options->limit);
			if (options->verbose) {
				printf("ok=%ld waiting=%ld fail=%ld\n", tally.ok, tally.waiting, failures());
				fflush(stdout);
			}
		}
		if (tally.started >= options->wanted && !tally.waiting && !end)
			end = now();
		if (end && options->hold >= 0 && now() - end >= options->hold)
			break;
	}
	printf("ok=%ld fail=%ld refused=%ld timeout=%ld noport=%ld other=%ld late=%ld secs=%.3f"
	       " extmin=%d extmax=%d extports=%d",
	       tally.ok, failures(), tally.refused, tally.timeout, tally.noport, tally.other, tally.late,
	       (end ? end : now()) - begin, tally.ext_ports ? tally.ext_min : 0, tally.ext_max, tally.ext_ports);
	if (options->check) {
		long alive = count_alive(epoll, options->limit);
		printf(" alive=%ld dead=%ld", alive, tally.ok - alive);
	}
	puts("");
	/* Connections that are still open go with the process; with -R they must go by RST. */
	for (int fd = 3; options->reset && fd <= highest_fd; fd++)
		if (fd != epoll)
			finish(fd, true);
	return tally.ok == options->wanted ? 0 : 2;
}

static void allow_many_files(void)
{
	struct rlimit limit = {1 << 20, 1 << 20};

	if (setrlimit(RLIMIT_NOFILE, &limit) == 0)
		return;
	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
}

static int usage(void)
{
	fputs("usage: conngen -l PORT [-w FILE] | conngen [-u] [-r RATE] [-b BURST] [-n NAME] [-e PERIOD] [-t HOLD] [-c]"
	      " [-R] [-p P0-P1] [-k] [-T LIMIT] [-C] ADDRESS PORT N\n", stderr);
	return 64;
}

int main(int argc, char **argv)
{
	struct options options = {.limit = 5, .burst = 1, .server.sin_family = AF_INET};
	const char *records_file = NULL;
	int option, listen_port = 0;

	while ((option = getopt(argc, argv, "l:w:ur:b:n:e:t:cRp:kCT:")) > 0)
		switch (option) {
		case 'l': listen_port = atoi(optarg); break;
		case 'w': records_file = optarg; break;
		case 'b': options.burst = atoi(optarg); break;
		case 'n': options.name = optarg; break;
		case 'e': options.period = atof(optarg); break;
		case 'u': options.udp = true; break;
		case 'r': options.rate = atof(optarg); break;
		case 't': options.hold = atof(optarg); break;
		case 'c': options.close_at_once = true; break;
		case 'R': options.reset = true; break;
		case 'k': options.check = true; break;
		case 'C': options.verbose = true; break;
		case 'T': options.limit = atof(optarg); break;
		case 'p':
			if (sscanf(optarg, "%d-%d", &options.first_port, &options.last_port) == 2)
				break;
			/* fall through */
		default: return usage();
		}
	allow_many_files();
	signal(SIGTERM, stop);
	signal(SIGINT, stop);
	signal(SIGPIPE, SIG_IGN);
	if (records_file && !(recording = fopen(records_file, "a"))) {
		perror("conngen: cannot write the records");
		return 1;
	}
	if (listen_port)
		return serve(listen_port);
	if (argc - optind != 3 || !inet_aton(argv[optind], &options.server.sin_addr))
		return usage();
	options.server.sin_port = htons(atoi(argv[optind + 1]));
	options.wanted = atol(argv[optind + 2]);
	return generate(&options);
}
