/* Threads, locks and thread-local storage of glibc. */
#include "checks.h"
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

static void *square(void *number) {
    return (void *)((uintptr_t)number * (uintptr_t)number);
}

static void create_and_join(void) {
    for (uintptr_t round = 0; round < 4; round++) {
        pthread_t threads[4];
        for (uintptr_t index = 0; index < 4; index++)
            REQUIRE(pthread_create(&threads[index], NULL, square, (void *)(index + round)) == 0);
        for (uintptr_t index = 0; index < 4; index++) {
            void *result;
            REQUIRE(pthread_join(threads[index], &result) == 0);
            REQUIRE((uintptr_t)result == (index + round) * (index + round));
        }
    }
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long counter;

static void *count_up(void *unused) {
    for (int round = 0; round < 2000; round++) {
        pthread_mutex_lock(&lock);
        long seen = counter;
        if (round % 100 == 0)
            sched_yield(); /* with the lock held: the others must wait in the kernel */
        counter = seen + 1;
        pthread_mutex_unlock(&lock);
    }
    return unused;
}

static void mutex_under_contention(void) {
    pthread_t threads[3];
    for (int index = 0; index < 3; index++)
        REQUIRE(pthread_create(&threads[index], NULL, count_up, NULL) == 0);
    for (int index = 0; index < 3; index++)
        pthread_join(threads[index], NULL);
    REQUIRE(counter == 6000);
}

static pthread_cond_t turned = PTHREAD_COND_INITIALIZER;
static int turn;

static void *answer(void *unused) {
    pthread_mutex_lock(&lock);
    for (int round = 0; round < 100; round++) {
        while (turn != 1)
            pthread_cond_wait(&turned, &lock);
        turn = 0;
        pthread_cond_signal(&turned);
    }
    pthread_mutex_unlock(&lock);
    return unused;
}

static void condition_variable(void) {
    pthread_t thread;
    REQUIRE(pthread_create(&thread, NULL, answer, NULL) == 0);
    pthread_mutex_lock(&lock);
    for (int round = 0; round < 100; round++) {
        turn = 1;
        pthread_cond_signal(&turned);
        while (turn != 0)
            pthread_cond_wait(&turned, &lock);
    }
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 20000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    REQUIRE(pthread_cond_timedwait(&turned, &lock, &until) == ETIMEDOUT);
    pthread_mutex_unlock(&lock);
    pthread_join(thread, NULL);
}

static _Thread_local long mine = 5;
static pthread_key_t key;
static int destroyed;

static void destroy(void *value) {
    __atomic_add_fetch(&destroyed, *(char *)value == 'k', __ATOMIC_SEQ_CST);
}

static void *own_storage(void *number) {
    pthread_setspecific(key, "k");
    for (int round = 0; round < 50; round++) {
        REQUIRE(mine == (round ? (long)number + round - 1 : 5));
        mine = (long)number + round;
        errno = (int)(long)number;
        sched_yield();
        REQUIRE(errno == (int)(long)number);
    }
    return &mine;
}

static void local_storage(void) {
    pthread_t threads[3];
    void *addresses[3];
    REQUIRE(pthread_key_create(&key, destroy) == 0);
    for (long index = 0; index < 3; index++)
        REQUIRE(pthread_create(&threads[index], NULL, own_storage, (void *)(index * 1000)) == 0);
    for (int index = 0; index < 3; index++)
        pthread_join(threads[index], &addresses[index]);
    REQUIRE(addresses[0] != addresses[1] && addresses[1] != addresses[2] && addresses[0] != addresses[2]);
    REQUIRE(mine == 5 && destroyed == 3);
}

static sem_t semaphore;

static void *cancelled(void *unused) {
    sem_post(&semaphore);
    for (;;)
        pause();
    return unused;
}

static void cancellation(void) {
    pthread_t thread;
    void *result;
    sem_init(&semaphore, 0, 0);
    REQUIRE(pthread_create(&thread, NULL, cancelled, NULL) == 0);
    sem_wait(&semaphore);
    REQUIRE(pthread_cancel(thread) == 0 && pthread_join(thread, &result) == 0);
    REQUIRE(result == PTHREAD_CANCELED);
}

const struct check thread_checks[] = {
    {"create_and_join", create_and_join},
    {"mutex_under_contention", mutex_under_contention},
    {"condition_variable", condition_variable},
    {"local_storage", local_storage},
    {"cancellation", cancellation},
    {NULL, NULL},
};
