/* Prints how many nanoseconds a cache line takes from one core to another: cc -O2 -pthread. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { ROUNDS = 20000 };
static _Alignas(128) atomic_int owner;

static void pin(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  if (sched_setaffinity(0, sizeof set, &set)) {
    perror("sched_setaffinity");
    exit(1);
  }
}

static void play(int self) {
  for (int i = 0; i < ROUNDS; i++) {
    while (atomic_load_explicit(&owner, memory_order_acquire) != self) {
    }
    atomic_store_explicit(&owner, !self, memory_order_release);
  }
}

static void *other(void *unused) {
  pin(1);
  play(1);
  return unused;
}

int main(void) {
  struct timespec start, end;
  pthread_t thread;
  pin(0);
  pthread_create(&thread, 0, other, 0);
  clock_gettime(CLOCK_MONOTONIC, &start);
  play(0);
  pthread_join(thread, 0);
  clock_gettime(CLOCK_MONOTONIC, &end);
  printf("%.0f\n", (1e9 * (end.tv_sec - start.tv_sec) + end.tv_nsec - start.tv_nsec) / (2 * ROUNDS));
}
