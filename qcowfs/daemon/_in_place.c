/* Reads and writes of clusters whose place is known, answered without a call into Python.
 *
 * Owns two permits, one to read and one to write. A handler gives one for an open file when it has just
 * done such a request itself: the dictionary of places is the engine's own, which forgets a place as soon as
 * its entry changes. A permit ends with the row of requests that are answered before any task runs again.
 */
#include "_in_place.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum {
    LEAST_SPLICED = 1 << 15, /* bytes: fewer are copied as fast as their pages are handed over */
    MOST = 1 << 18,          /* bytes written, or read into the buffer; more is worth a thread */
    MUCH = 1 << 18,          /* bytes: handing more over takes long enough to let other threads run */
    SYS_CACHESTAT = 451,     /* the same on all machines; older kernels do not know it */
};
static const long SLOW_WRITE_NS = 50000000; /* the host holds writers back, so let the engine use threads */

struct permit {
    PyObject *places; /* NULL: there is no permit. Cluster of the disk to its offset in the file */
    unsigned long long fh;
    int cluster_bits;
    int fd;
    long long end; /* of the disk */
};

static struct permit reads, writes;
static PyObject *on_written;
static long long written_count, written_bytes, written_low, written_high;
static char *buffer;

void set_listener(PyObject *listener) {
    on_written = listener;
}

static PyObject *give(struct permit *permit, PyObject *args) {
    struct permit new;
    if (!PyArg_ParseTuple(
            args, "KO!iiL", &new.fh, &PyDict_Type, &new.places, &new.cluster_bits, &new.fd, &new.end))
        return NULL;
    if (buffer == NULL) {
        void *pages = mmap(NULL, MOST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (pages == MAP_FAILED)
            return PyErr_NoMemory();
        buffer = pages;
    }
    Py_INCREF(new.places);
    Py_XSETREF(permit->places, new.places);
    *permit = new;
    Py_RETURN_NONE;
}

PyObject *permit_reads(PyObject *self, PyObject *args) {
    (void)self;
    return give(&reads, args);
}

PyObject *permit_writes(PyObject *self, PyObject *args) {
    (void)self;
    return give(&writes, args);
}

static long long cluster_place(const struct permit *permit, long long cluster) {
    PyObject *number = PyLong_FromLongLong(cluster);
    PyObject *start = number == NULL ? NULL : PyDict_GetItemWithError(permit->places, number);
    Py_XDECREF(number);
    long long place = start == NULL ? -1 : PyLong_AsLongLong(start);
    if (PyErr_Occurred() != NULL)
        PyErr_Clear(); /* the handler will meet it again, and report it */
    return place;
}

/* Where the bytes lie in the file, if they do so in one run; -1 if the engine has to be asked. */
static long long place_of(const struct permit *permit, unsigned long long fh, off_t off, size_t size) {
    if (permit->places == NULL || fh != permit->fh || off + (long long)size > permit->end)
        return -1;
    long long cluster_size = 1LL << permit->cluster_bits, within = off & (cluster_size - 1);
    long long cluster = off >> permit->cluster_bits, first = cluster_place(permit, cluster), next = first;
    for (long long left = (long long)size + within; first >= 0 && (left -= cluster_size) > 0;) {
        next += cluster_size;
        if (cluster_place(permit, ++cluster) != next)
            return -1;
    }
    return first < 0 ? -1 : first + within;
}

/* Whether the page cache holds the whole range, which the end of the file does not cut. */
static bool is_cached(int fd, long long place, size_t size) {
    struct { uint64_t off, len; } range = {(uint64_t)place, size};
    struct { uint64_t cache, dirty, writeback, evicted, recently_evicted; } pages;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t wanted = (range.off + size - 1) / page - range.off / page + 1;
    if (syscall(SYS_CACHESTAT, fd, &range, &pages, 0) != 0 || pages.cache < wanted)
        return false;
    char last;
    struct iovec part = {.iov_base = &last, .iov_len = 1};
    return preadv2(fd, &part, 1, place + (long long)size - 1, RWF_NOWAIT) == 1;
}

/* Answer with pages of the host's page cache, by one copy instead of two. */
static bool hand_pages_over(fuse_req_t req, int fd, long long place, size_t size) {
    if (size < LEAST_SPLICED || !is_cached(fd, place, size))
        return false;
    struct fuse_bufvec pages = FUSE_BUFVEC_INIT(size);
    pages.buf[0].flags = FUSE_BUF_IS_FD | FUSE_BUF_FD_SEEK;
    pages.buf[0].fd = fd;
    pages.buf[0].pos = place;
    if (size < MUCH) {
        fuse_reply_data(req, &pages, 0);
        return true;
    }
    Py_BEGIN_ALLOW_THREADS
    fuse_reply_data(req, &pages, 0);
    Py_END_ALLOW_THREADS
    return true;
}

bool read_in_place(fuse_req_t req, size_t size, off_t off, const struct fuse_file_info *fi) {
    long long place = place_of(&reads, fi->fh, off, size);
    if (place < 0)
        return false;
    if (hand_pages_over(req, reads.fd, place, size))
        return true;
    struct iovec part = {.iov_base = buffer, .iov_len = size};
    if (size > MOST || preadv2(reads.fd, &part, 1, place, RWF_NOWAIT) != (ssize_t)size)
        return false;
    fuse_reply_buf(req, buffer, size);
    return true;
}

static long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void note_written(long long place, size_t size) {
    if (written_count == 0 || place < written_low)
        written_low = place;
    if (written_count == 0 || place + (long long)size > written_high)
        written_high = place + (long long)size;
    written_count++;
    written_bytes += (long long)size;
}

/* What a write did not take is written again by the handler, which knows what to do about an error. */
bool write_in_place(fuse_req_t req, const void *data, size_t size, off_t off, const struct fuse_file_info *fi) {
    long long place = size > MOST ? -1 : place_of(&writes, fi->fh, off, size);
    if (place < 0)
        return false;
    long start = now();
    ssize_t done = pwrite(writes.fd, data, size, place);
    if (done > 0)
        note_written(place, (size_t)done);
    if (now() - start > SLOW_WRITE_NS)
        end_write_permit();
    if (done != (ssize_t)size)
        return false;
    fuse_reply_write(req, size);
    return true;
}

static void tell_what_was_written(void) {
    if (written_count == 0)
        return;
    PyObject *result = PyObject_CallFunction(
        on_written, "LLLL", written_count, written_bytes, written_low, written_high);
    if (result == NULL)
        PyErr_WriteUnraisable(on_written);
    Py_XDECREF(result);
    written_count = written_bytes = 0;
}

void end_write_permit(void) {
    tell_what_was_written();
    Py_CLEAR(writes.places);
}

void end_permits(void) {
    end_write_permit();
    Py_CLEAR(reads.places);
}
