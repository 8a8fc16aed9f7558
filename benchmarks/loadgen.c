// loadgen.c - light, single-threaded epoll load generator for OpenAI-style HTTP/1.1 endpoints (SSE
// or JSON). build: gcc -O2 -o loadgen loadgen.c -lm          (loadgen.py builds and drives it; see
// there for usage) usage: loadgen -p PORT -b BODIES [-h 127.0.0.1] [-u /v1/chat/completions] [-c
// CONC] [-n REQS | -d SECONDS]
//                [-w WARMUP_REQS] [-R RAMP_MS] [-t TIMEOUT_S] [-P name=pid[,pid..]]... [-H "Header:
//                v"]... [-C] [-A K] [-D dump.csv]
//   BODIES  : file of request bodies, one JSON object per line; they are used round-robin.
//   -C      : new connection for every request (default keep-alive)
//   -A K    : close the connection after K content events (client disconnect test)
//   -P      : processes whose CPU time (/proc/PID/stat utime+stime) and RSS are reported over the
//   measured phase
// Output: one JSON object on stdout.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}
typedef struct {
  float *a;
  size_t n, cap;
} vec;
static void push(vec *v, double x) {
  if (v->n == v->cap) {
    v->cap = v->cap ? v->cap * 2 : 1 << 16;
    v->a = realloc(v->a, v->cap * sizeof(float));
    if (!v->a) {
      perror("realloc");
      exit(2);
    }
  }
  v->a[v->n++] = (float)x;
}
static int cmpf(const void *a, const void *b) {
  float x = *(float *)a, y = *(float *)b;
  return x < y ? -1 : x > y;
}
static double pct(vec *v, double p) {
  if (!v->n) return -1;
  size_t i = (size_t)(p / 100.0 * (v->n - 1) + 0.5);
  return v->a[i];
}
static double mean(vec *v) {
  double s = 0;
  for (size_t i = 0; i < v->n; i++) s += v->a[i];
  return v->n ? s / v->n : -1;
}

static char *host = "127.0.0.1", *path = "/v1/chat/completions";
static int port = 8000, conc = 1, closeconn = 0, abortk = 0;
static long nreq = 0, warm = 0;
static double dur = 0, timeout_s = 60, ramp = 0;
static char extra[4096] = "";
static char **reqs;
static size_t *reqlen;
static int nbody = 0;
static long rr = 0;
static struct {
  char name[64];
  int pid[256];
  int np;
  double cpu0, cpu1, sys0, sys1;
  long rss;
  long hwm;
} procs[16];
static int nprocs = 0;

enum { IDLE, CONNECTING, SENDING, HEAD, BODY };
typedef struct {
  int fd, st;
  size_t soff;
  int bi;
  double t0, tfirst, tlast;
  long ev, cev, toks;
  int status;
  int chunked;
  long clen, got;
  int connclose;
  int done;
  int err;
  int cs;
  long crem;  // chunk state 0 size,1 ext,2 data,3 CR,4 LF,5 trailer
  char hb[16384];
  size_t hn;
  char *lb;
  size_t ln, lcap;
  double startat;
  int stream;
  long ptoks;
} conn;
static conn *C;
static int ep;
static vec ttft, itl, tpot, lat;
static long completed = 0, errors = 0, issued = 0, events = 0, cevents = 0, tokens = 0, ptokens = 0,
            bytes = 0, aborted = 0, conns = 0, nonusage = 0, readcalls = 0;
static long st_count[6];
static char errsample[512] = "";
static long target = 0;
static double stop_at = 0;
static int measuring = 0;
static FILE *dump = NULL;

static double cpu_of(int pid, double *sys) {
  char f[64], b[1024];
  snprintf(f, 64, "/proc/%d/stat", pid);
  FILE *h = fopen(f, "r");
  if (!h) return 0;
  size_t n = fread(b, 1, 1023, h);
  fclose(h);
  b[n] = 0;
  char *p = strrchr(b, ')');
  if (!p) return 0;
  unsigned long u = 0, s = 0;
  sscanf(p + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &u, &s);
  double hz = sysconf(_SC_CLK_TCK);
  *sys += s / hz;
  return (u + s) / hz;
}
static long stat_kb(int pid, const char *key) {
  char f[64], l[256];
  snprintf(f, 64, "/proc/%d/status", pid);
  FILE *h = fopen(f, "r");
  if (!h) return 0;
  long v = 0;
  size_t k = strlen(key);
  while (fgets(l, 256, h))
    if (!strncmp(l, key, k)) {
      v = atol(l + k + 1);
      break;
    }
  fclose(h);
  return v;
}
static void sysstat(double *busy, double *steal) {
  FILE *h = fopen("/proc/stat", "r");
  double v[8] = {0};
  *busy = *steal = 0;
  if (!h) return;
  if (fscanf(h, "cpu %lf %lf %lf %lf %lf %lf %lf %lf", v, v + 1, v + 2, v + 3, v + 4, v + 5, v + 6,
             v + 7) == 8) {
    double hz = sysconf(_SC_CLK_TCK);
    *busy = (v[0] + v[1] + v[2] + v[5] + v[6]) / hz;
    *steal = v[7] / hz;
  }
  fclose(h);
}
static double selfcpu(void) {
  struct rusage r;
  getrusage(RUSAGE_SELF, &r);
  return r.ru_utime.tv_sec + r.ru_utime.tv_usec * 1e-6 + r.ru_stime.tv_sec +
         r.ru_stime.tv_usec * 1e-6;
}

static void ctl(conn *c, int op, uint32_t ev) {
  struct epoll_event e = {.events = ev, .data.ptr = c};
  epoll_ctl(ep, op, c->fd, &e);
}
static void reset(conn *c) {
  c->soff = 0;
  c->t0 = now();
  c->tfirst = c->tlast = 0;
  c->ev = c->cev = 0;
  c->toks = -1;
  c->ptoks = 0;
  c->status = 0;
  c->chunked = 0;
  c->clen = -1;
  c->got = 0;
  c->connclose = 0;
  c->done = 0;
  c->err = 0;
  c->cs = 0;
  c->crem = 0;
  c->hn = 0;
  c->ln = 0;
  c->stream = 0;
}
static void do_close(conn *c) {
  if (c->fd >= 0) {
    close(c->fd);
    c->fd = -1;
  }
  c->st = IDLE;
}
static int can_issue(void) {
  if (stop_at > 0) return now() < stop_at;
  return issued < target;
}
static void sendmore(conn *c) {
  while (c->soff < reqlen[c->bi]) {
    ssize_t k = send(c->fd, reqs[c->bi] + c->soff, reqlen[c->bi] - c->soff, MSG_NOSIGNAL);
    if (k < 0) {
      if (errno == EAGAIN) {
        if (c->st != SENDING) {
        }
        c->st = SENDING;
        ctl(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
        return;
      }
      c->err = 1;
      return;
    }
    c->soff += k;
  }
  if (c->st == SENDING || c->st == CONNECTING) ctl(c, EPOLL_CTL_MOD, EPOLLIN);
  c->st = HEAD;
}
static void issue(conn *c) {
  issued++;
  c->bi = rr++ % nbody;
  reset(c);
  if (c->fd < 0) {
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    conns++;
    int one = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, host, &a.sin_addr);
    int r = connect(c->fd, (struct sockaddr *)&a, sizeof a);
    c->st = CONNECTING;
    ctl(c, EPOLL_CTL_ADD, EPOLLIN | EPOLLOUT);
    if (r < 0 && errno != EINPROGRESS) c->err = 1;
    return;
  }
  c->st = HEAD;
  sendmore(c);
}
static long jnum(const char *b, size_t n, const char *k) {
  char *p = memmem(b, n, k, strlen(k));
  if (!p) return -1;
  p += strlen(k);
  while (*p == ' ' || *p == ':') p++;
  return atol(p);
}
static int has_content(const char *l, size_t n) {
  const char *ks[] = {"\"content\":", "\"text\":", "\"reasoning_content\":"};
  for (int i = 0; i < 3; i++) {
    const char *p = memmem(l, n, ks[i], strlen(ks[i]));
    if (p) {
      p += strlen(ks[i]);
      while (*p == ' ') p++;
      if (*p == '"' && p[1] != '"') return 1;
    }
  }
  return 0;
}
static void line(conn *c, char *l, size_t n, double t) {  // one line of the SSE stream
  if (n && l[n - 1] == '\r') n--;
  l[n] = 0;
  if (n < 5 || strncmp(l, "data:", 5)) {
    if (n >= 12 && !strncmp(l, "event: error", 12)) c->err = 3;
    return;
  }
  char *p = l + 5;
  while (*p == ' ') p++;
  size_t m = n - (p - l);
  if (m >= 6 && !memcmp(p, "[DONE]", 6)) {
    c->done = 1;
    return;
  }
  c->ev++;
  if (m > 8 && !memcmp(p, "{\"error\"", 8)) {
    c->err = 3;
    if (!*errsample) snprintf(errsample, 500, "%s", p);
  }
  if (has_content(p, m)) {
    c->cev++;
    if (c->tfirst == 0) {
      c->tfirst = t;
      if (measuring) push(&ttft, t - c->t0);
    } else if (measuring)
      push(&itl, t - c->tlast);
    c->tlast = t;
  }
  char *u = memmem(p, m, "\"completion_tokens\"", 19);
  if (u) {
    long v = jnum(u, m - (u - p), "\"completion_tokens\"");
    if (v >= 0) c->toks = v;
    long q = jnum(p, m, "\"prompt_tokens\"");
    if (q > 0) c->ptoks = q;
  }
}
static void feed(conn *c, const char *b, size_t n, double t) {
  c->got += n;
  while (n) {
    const char *e = c->stream ? memchr(b, '\n', n) : NULL;
    size_t k = e ? (size_t)(e - b) : n;
    if (c->ln + k + 2 > c->lcap) {
      c->lcap = (c->ln + k + 2) * 2;
      c->lb = realloc(c->lb, c->lcap);
    }
    memcpy(c->lb + c->ln, b, k);
    c->ln += k;
    if (e) {
      line(c, c->lb, c->ln, t);
      c->ln = 0;
      k++;
    }
    b += k;
    n -= k;
  }
}
// returns 1 when the response is complete
static int body(conn *c, const char *b, size_t n, double t) {
  if (!c->chunked) {
    feed(c, b, n, t);
    return c->clen >= 0 && c->got >= c->clen;
  }
  while (n) {
    switch (c->cs) {
      case 0: {
        char ch = *b++;
        n--;
        if (ch == '\n') {
          if (c->crem == 0)
            c->cs = 5, c->hn = 0;
          else
            c->cs = 2;
        } else if (ch == ';')
          c->cs = 1;
        else if (ch != '\r') {
          int v = ch <= '9' ? ch - '0' : (ch | 32) - 'a' + 10;
          c->crem = c->crem * 16 + v;
        }
        break;
      }
      case 1: {
        char ch = *b++;
        n--;
        if (ch == '\n') {
          if (c->crem == 0)
            c->cs = 5, c->hn = 0;
          else
            c->cs = 2;
        }
        break;
      }
      case 2: {
        size_t k = n < (size_t)c->crem ? n : (size_t)c->crem;
        feed(c, b, k, t);
        b += k;
        n -= k;
        c->crem -= k;
        if (!c->crem) c->cs = 3;
        break;
      }
      case 3:
        b++;
        n--;
        c->cs = 4;
        break;
      case 4:
        b++;
        n--;
        c->cs = 0;
        c->crem = 0;
        break;
      case 5: {
        char ch = *b++;
        n--;
        if (ch == '\n') {
          if (c->hn == 0) return 1;
          c->hn = 0;
        } else if (ch != '\r')
          c->hn++;
        break;
      }
    }
  }
  return 0;
}
static int header(conn *c) {
  char *e = memmem(c->hb, c->hn, "\r\n\r\n", 4);
  if (!e) return 0;
  *e = 0;
  c->status = atoi(c->hb + 9);
  for (char *p = strstr(c->hb, "\r\n"); p; p = strstr(p, "\r\n")) {
    p += 2;
    if (!strncasecmp(p, "transfer-encoding:", 18) && strcasestr(p + 18, "chunked") &&
        strcasestr(p + 18, "chunked") < (strstr(p, "\r\n") ? strstr(p, "\r\n") : e))
      c->chunked = 1;
    else if (!strncasecmp(p, "content-length:", 15))
      c->clen = atol(p + 15);
    else if (!strncasecmp(p, "connection:", 11) &&
             !strncasecmp(p + 11 + (p[11] == ' '), "close", 5))
      c->connclose = 1;
    else if (!strncasecmp(p, "content-type:", 13) &&
             !strncasecmp(p + 13 + (p[13] == ' '), "text/event-stream", 17))
      c->stream = 1;
  }
  return (int)(e - c->hb) + 4;
}
static void finish(conn *c, double t, int complete) {
  if (c->st == IDLE) return;
  int k = c->status / 100;
  if (k >= 0 && k < 6) st_count[k]++;
  int ok = complete && c->status == 200 && !c->err;
  if (!c->stream && c->ln) {
    c->lb[c->ln] = 0;
    if (c->status != 200 && !*errsample) snprintf(errsample, 500, "%d %s", c->status, c->lb);
    long v = jnum(c->lb, c->ln, "\"completion_tokens\"");
    if (v >= 0) c->toks = v;
    v = jnum(c->lb, c->ln, "\"prompt_tokens\"");
    if (v > 0) c->ptoks = v;
  }
  if (!complete && !*errsample)
    snprintf(errsample, 500, "connection ended early: status=%d events=%ld got=%ld err=%d",
             c->status, c->ev, c->got, c->err);
  if (ok && c->stream && !c->done) ok = 0;
  if (measuring) {
    long tk = c->toks >= 0 ? c->toks : c->cev;
    if (c->toks < 0) nonusage++;
    events += c->ev;
    cevents += c->cev;
    if (ok) {
      tokens += tk;
      ptokens += c->ptoks;
      push(&lat, t - c->t0);
      if (c->stream && tk > 1 && c->tfirst > 0) push(&tpot, (c->tlast - c->tfirst) / (tk - 1));
    }
    if (dump)
      fprintf(dump, "%.6f,%.6f,%.6f,%d,%ld,%ld,%d\n", c->t0, c->tfirst ? c->tfirst - c->t0 : -1,
              t - c->t0, c->status, c->ev, tk, ok);
  }
  if (ok)
    completed++;
  else
    errors++;
  c->ln = 0;
  if (!complete || c->connclose || closeconn || c->err)
    do_close(c);
  else
    c->st = IDLE;
}
static void on(conn *c, uint32_t ev) {
  static char buf[1 << 18];
  if (c->st == CONNECTING) {
    int e = 0;
    socklen_t l = sizeof e;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &e, &l);
    if (e || (ev & EPOLLERR)) {
      c->err = 2;
      finish(c, now(), 0);
      return;
    }
    if (ev & EPOLLOUT) {
      sendmore(c);
      if (c->err) {
        finish(c, now(), 0);
      }
      return;
    }
  }
  if (c->st == SENDING && (ev & EPOLLOUT)) {
    sendmore(c);
    if (c->err) {
      finish(c, now(), 0);
      return;
    }
  }
  if (!(ev & (EPOLLIN | EPOLLHUP | EPOLLERR))) return;
  for (;;) {
    ssize_t n = read(c->fd, buf, sizeof buf - 1);
    if (n < 0) {
      if (errno == EAGAIN) return;
      c->err = 2;
      if (c->st == IDLE)
        do_close(c);
      else
        finish(c, now(), 0);
      return;
    }
    double t = now();
    if (n == 0) {
      if (c->st == IDLE) {
        do_close(c);
        return;
      }
      int comp = (c->st == BODY && !c->chunked && c->clen < 0);
      finish(c, t, comp);
      do_close(c);
      return;
    }
    if (measuring) {
      bytes += n;
      readcalls++;
    }
    if (c->st == IDLE) return;  // stray bytes
    const char *b = buf;
    size_t m = n;
    int comp = 0;
    if (c->st != BODY) {
      size_t old = c->hn;
      size_t k = m < sizeof(c->hb) - 1 - c->hn ? m : sizeof(c->hb) - 1 - c->hn;
      memcpy(c->hb + c->hn, b, k);
      c->hn += k;
      c->hb[c->hn] = 0;
      int h = header(c);
      if (!h) {
        if (c->hn >= sizeof(c->hb) - 1) {
          c->err = 4;
          finish(c, t, 0);
          return;
        }
        if ((size_t)n < sizeof buf - 1) return;
        continue;
      }
      b += h - old;
      m -= h - old;
      c->st = BODY;
      c->hn = 0;
      if (!c->chunked && c->clen == 0) comp = 1;
    }
    if (m) comp = body(c, b, m, t);
    if (abortk && c->cev >= abortk && !comp) {
      aborted++;
      c->st = IDLE;
      do_close(c);
      return;
    }
    if (comp) {
      finish(c, t, 1);
      return;
    }
    if ((size_t)n < sizeof buf - 1) return;
  }
}
static void run(void) {
  struct epoll_event ev[512];
  double t0 = now();
  for (int i = 0; i < conc; i++) C[i].startat = t0 + (measuring ? ramp / 1000.0 * i / conc : 0);
  double lastscan = t0;
  for (;;) {
    int act = 0, pend = 0;
    double t = now();
    for (int i = 0; i < conc; i++) {
      conn *c = &C[i];
      if (c->st == IDLE && can_issue()) {
        if (c->startat > t) {
          pend++;
          continue;
        }
        issue(c);
        if (c->err) finish(c, now(), 0);
      }
      if (c->st != IDLE) act++;
    }
    if (!act && !pend) break;
    int n = epoll_wait(ep, ev, 512, pend ? 1 : 200);
    for (int i = 0; i < n; i++) {
      conn *c = ev[i].data.ptr;
      if (c->fd >= 0) on(c, ev[i].events);
      while (c->st == IDLE && can_issue()) {
        issue(c);
        if (c->err)
          finish(c, now(), 0);
        else
          break;
      }
    }
    t = now();
    if (t - lastscan > 0.5) {
      lastscan = t;
      for (int i = 0; i < conc; i++)
        if (C[i].st != IDLE && t - C[i].t0 > timeout_s) {
          C[i].err = 5;
          finish(&C[i], t, 0);
        }
    }
    if (errors > 5000) break;
  }
}
static void vout(const char *k, vec *v) {
  qsort(v->a, v->n, sizeof(float), cmpf);
  printf(",\"%s\":{\"n\":%zu,\"mean\":%.3f,\"p50\":%.3f,\"p90\":%.3f,\"p99\":%.3f,\"max\":%.3f}", k,
         v->n, 1e3 * mean(v), 1e3 * pct(v, 50), 1e3 * pct(v, 90), 1e3 * pct(v, 99),
         1e3 * pct(v, 100));
}
int main(int argc, char **argv) {
  int o;
  char *bf = NULL;
  signal(SIGPIPE, SIG_IGN);
  while ((o = getopt(argc, argv, "h:p:u:c:n:d:w:R:t:P:b:H:CA:D:")) > 0) switch (o) {
      case 'h':
        host = optarg;
        break;
      case 'p':
        port = atoi(optarg);
        break;
      case 'u':
        path = optarg;
        break;
      case 'c':
        conc = atoi(optarg);
        break;
      case 'n':
        nreq = atol(optarg);
        break;
      case 'd':
        dur = atof(optarg);
        break;
      case 'w':
        warm = atol(optarg);
        break;
      case 'R':
        ramp = atof(optarg);
        break;
      case 't':
        timeout_s = atof(optarg);
        break;
      case 'b':
        bf = optarg;
        break;
      case 'H':
        snprintf(extra + strlen(extra), sizeof extra - strlen(extra), "%s\r\n", optarg);
        break;
      case 'C':
        closeconn = 1;
        break;
      case 'A':
        abortk = atoi(optarg);
        break;
      case 'D':
        dump = fopen(optarg, "w");
        break;
      case 'P': {
        char *q = strchr(optarg, '=');
        if (!q) return 2;
        *q = 0;
        snprintf(procs[nprocs].name, 64, "%s", optarg);
        for (char *s = strtok(q + 1, ","); s; s = strtok(NULL, ","))
          procs[nprocs].pid[procs[nprocs].np++] = atoi(s);
        nprocs++;
        break;
      }
      default:
        return 2;
    }
  if (!bf) {
    fprintf(stderr, "-b needed\n");
    return 2;
  }
  FILE *h = fopen(bf, "r");
  if (!h) {
    perror(bf);
    return 2;
  }
  char *l = NULL;
  size_t cap = 0;
  ssize_t n;
  while ((n = getline(&l, &cap, h)) > 0) {
    if (l[n - 1] == '\n') l[--n] = 0;
    if (!n) continue;
    reqs = realloc(reqs, sizeof(char *) * (nbody + 1));
    reqlen = realloc(reqlen, sizeof(size_t) * (nbody + 1));
    char *r = malloc(n + 1024 + strlen(extra));
    int k = sprintf(r,
                    "POST %s HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\nAccept: "
                    "*/*\r\n%s%sContent-Length: %zd\r\n\r\n",
                    path, host, port, extra, closeconn ? "Connection: close\r\n" : "", n);
    memcpy(r + k, l, n);
    reqs[nbody] = r;
    reqlen[nbody] = k + n;
    nbody++;
  }
  fclose(h);
  if (!nbody) {
    fprintf(stderr, "no bodies\n");
    return 2;
  }
  C = calloc(conc, sizeof(conn));
  for (int i = 0; i < conc; i++) C[i].fd = -1;
  ep = epoll_create1(0);
  if (warm) {
    target = warm;
    run();
  }
  long werr = errors, wok = completed;
  completed = errors = issued = 0;
  memset(st_count, 0, sizeof st_count);
  conns = 0;
  target = nreq;
  if (dur > 0) stop_at = now() + dur;
  measuring = 1;
  for (int i = 0; i < nprocs; i++)
    for (int j = 0; j < procs[i].np; j++) procs[i].cpu0 += cpu_of(procs[i].pid[j], &procs[i].sys0);
  double b0, st0, b1, st1;
  sysstat(&b0, &st0);
  double s0 = selfcpu(), t0 = now();
  run();
  double t1 = now(), s1 = selfcpu();
  sysstat(&b1, &st1);
  for (int i = 0; i < nprocs; i++)
    for (int j = 0; j < procs[i].np; j++) {
      procs[i].cpu1 += cpu_of(procs[i].pid[j], &procs[i].sys1);
      procs[i].rss += stat_kb(procs[i].pid[j], "VmRSS");
      procs[i].hwm += stat_kb(procs[i].pid[j], "VmHWM");
    }
  double el = t1 - t0;
  printf(
      "{\"conc\":%d,\"elapsed_s\":%.3f,\"ok\":%ld,\"errors\":%ld,\"aborted\":%ld,\"warm_ok\":%ld,"
      "\"warm_err\":%ld,\"status\":{\"2xx\":%ld,\"4xx\":%ld,\"5xx\":%ld,\"none\":%ld},\"req_s\":%."
      "2f,\"out_tok_s\":%.1f,\"out_tokens\":%ld,\"prompt_tokens\":%ld,\"sse_events\":%ld,\"content_"
      "events\":%ld,\"no_usage\":%ld,\"rx_bytes\":%ld,\"reads\":%ld,\"conns\":%ld,\"rx_bytes_per_"
      "tok\":%.1f",
      conc, el, completed, errors, aborted, wok, werr, st_count[2], st_count[4], st_count[5],
      st_count[0], completed / el, tokens / el, tokens, ptokens, events, cevents, nonusage, bytes,
      readcalls, conns, tokens ? (double)bytes / tokens : 0);
  vout("ttft_ms", &ttft);
  vout("itl_ms", &itl);
  vout("tpot_ms", &tpot);
  vout("latency_ms", &lat);
  printf(",\"client_cpu_s\":%.3f,\"client_cpu_s_per_1k_tok\":%.5f", s1 - s0,
         tokens ? (s1 - s0) / tokens * 1000 : 0);
  {
    double known = s1 - s0;
    for (int i = 0; i < nprocs; i++) known += procs[i].cpu1 - procs[i].cpu0;
    printf(",\"other_cores_busy\":%.3f,\"steal_cores\":%.3f", ((b1 - b0) - known) / el,
           (st1 - st0) / el);
  }  // CPU used by anything not named with -P: contamination check
  printf(",\"procs\":{");
  for (int i = 0; i < nprocs; i++) {
    double d = procs[i].cpu1 - procs[i].cpu0;
    printf(
        "%s\"%s\":{\"cpu_s\":%.2f,\"sys_s\":%.2f,\"cpu_s_per_1k_tok\":%.5f,\"cpu_ms_per_req\":%.4f,"
        "\"util\":%.3f,\"rss_mb\":%.1f,\"hwm_mb\":%.1f}",
        i ? "," : "", procs[i].name, d, procs[i].sys1 - procs[i].sys0,
        tokens ? d / tokens * 1000 : 0, completed ? d * 1000 / completed : 0, d / el,
        procs[i].rss / 1024.0, procs[i].hwm / 1024.0);
  }
  printf("}");
  if (*errsample) {
    printf(",\"error_sample\":\"");
    for (char *p = errsample; *p; p++) {
      if (*p == '"' || *p == '\\') putchar('\\');
      if ((unsigned char)*p >= 32) putchar(*p);
    }
    printf("\"");
  }
  printf("}\n");
  if (dump) fclose(dump);
  return 0;
}
