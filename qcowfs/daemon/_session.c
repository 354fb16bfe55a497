/* The libfuse session, with what pyfuse3 leaves out: fallocate and lseek, data requests answered without a
 * copy, and requests that follow each other closely answered in a row.
 *
 * pyfuse3 calls libfuse by name, and this library is loaded before it with its names visible to all, so the
 * three functions of libfuse defined here are found first; each calls libfuse's own. Owns how a request is
 * taken and answered; what the answer is, Python's handlers say. Everything runs in the thread that serves
 * pyfuse3's loop, with the interpreter's lock held except while looking for the next request.
 */
#include "_in_place.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <time.h>

#undef fuse_session_new

enum { MOST_IN_A_ROW = 64, MUCH = 1 << 18 };
static const long LONGEST_WAIT_NS = 100000; /* for the next request: about as long as waking up would take */
static const long LONGEST_ROW_NS = 2000000; /* then the scheduler gets its turn */
enum { INTERFACE = 3 };                     /* goes up with every change that shim.py has to know of */
enum { LONGEST_SLEEP_MS = 2 };              /* in wait for a request, while nothing else waits for anything */

typedef struct fuse_session *new_session(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);
typedef struct fuse_session *new_session_versioned(
    struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *, void *);

static struct fuse_lowlevel_ops pyfuse3_ops;
static PyObject *on_read, *on_write, *on_fsync, *on_flush, *on_fallocate, *on_lseek;
static bool answered;  /* the last request was, at once, by a handler of ours */
static int under_way;  /* requests of others that wait for something: the scheduler is needed */
static long patience = LONGEST_WAIT_NS;
static long last_answer;

static void *libfuse(const char *name) {
    static void *handle;
    if (handle == NULL)
        handle = dlopen("libfuse3.so.4", RTLD_LAZY | RTLD_NOLOAD);
    if (handle == NULL)
        handle = dlopen("libfuse3.so.3", RTLD_LAZY | RTLD_NOLOAD);
    return handle == NULL ? NULL : dlsym(handle, name);
}

static long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

typedef int reply_buf_function(fuse_req_t, const char *, size_t);

/* As libfuse's, but while many bytes are copied to the kernel other threads may run, pyfuse3's answers too. */
int fuse_reply_buf(fuse_req_t req, const char *bytes, size_t size) {
    static reply_buf_function *real;
    if (real == NULL)
        real = (reply_buf_function *)libfuse("fuse_reply_buf");
    if (size < MUCH)
        return real(req, bytes, size);
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = real(req, bytes, size);
    Py_END_ALLOW_THREADS
    return result;
}

/* -- what a handler answered */

static void no_answer(PyObject *handler) {
    PyErr_WriteUnraisable(handler); /* handlers answer with a number, so this is a mistake of theirs */
}

/* 0 or more, or a negative errno; `*later` if the handler left it to pyfuse3's. Takes over `result`. */
static long long number(PyObject *handler, PyObject *result, bool *later) {
    *later = result == Py_None;
    long long answer = -EIO;
    if (result != NULL && !*later)
        answer = PyLong_AsLongLong(result);
    if (PyErr_Occurred() != NULL) {
        no_answer(handler);
        answer = -EIO;
    }
    Py_XDECREF(result);
    return answer;
}

static void session_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi) {
    if (read_in_place(req, size, off, fi)) {
        answered = true;
        return;
    }
    PyObject *result = PyObject_CallFunction(
        on_read, "KLn", (unsigned long long)fi->fh, (long long)off, (Py_ssize_t)size);
    if (result != NULL && PyObject_CheckBuffer(result)) {
        Py_buffer view;
        if (PyObject_GetBuffer(result, &view, PyBUF_CONTIG_RO) == 0) {
            fuse_reply_buf(req, view.buf, (size_t)view.len);
            PyBuffer_Release(&view);
            Py_DECREF(result);
            answered = true;
            return;
        }
    }
    bool later;
    long long answer = number(on_read, result, &later);
    if (later) {
        pyfuse3_ops.read(req, ino, size, off, fi);
        return;
    }
    fuse_reply_err(req, (int)-answer);
    answered = true;
}

/* The handler may use the data until it has answered; they stay in the buffer of the task that waits for it. */
static void session_write(
    fuse_req_t req, fuse_ino_t ino, struct fuse_bufvec *data, off_t off, struct fuse_file_info *fi) {
    if (data->count != 1 || data->off != 0 || data->buf[0].flags & FUSE_BUF_IS_FD) {
        pyfuse3_ops.write_buf(req, ino, data, off, fi);
        return;
    }
    if (write_in_place(req, data->buf[0].mem, data->buf[0].size, off, fi)) {
        answered = true;
        return;
    }
    end_write_permit();
    PyObject *view = PyMemoryView_FromMemory(data->buf[0].mem, (Py_ssize_t)data->buf[0].size, PyBUF_READ);
    PyObject *result = view == NULL ? NULL
        : PyObject_CallFunction(on_write, "KLN", (unsigned long long)fi->fh, (long long)off, view);
    bool later;
    long long answer = number(on_write, result, &later);
    if (later) {
        struct fuse_bufvec nothing = FUSE_BUFVEC_INIT(0);
        nothing.buf[0].mem = data->buf[0].mem;
        pyfuse3_ops.write_buf(req, ino, &nothing, off, fi);
        return;
    }
    if (answer < 0)
        fuse_reply_err(req, (int)-answer);
    else
        fuse_reply_write(req, (size_t)answer);
    answered = true;
}

/* Whether the handler answered by itself; else pyfuse3's goes on with it. */
static bool answer_sync(fuse_req_t req, PyObject *handler, PyObject *result) {
    bool later;
    long long answer = number(handler, result, &later);
    if (later)
        return false;
    fuse_reply_err(req, (int)-answer);
    return answered = true;
}

static void session_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi) {
    end_write_permit(); /* what was written has to be told before */
    if (!answer_sync(req, on_fsync, PyObject_CallFunction(on_fsync, "Ki", (unsigned long long)fi->fh, datasync)))
        pyfuse3_ops.fsync(req, ino, datasync, fi);
}

static void session_flush(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi) {
    end_write_permit();
    if (!answer_sync(req, on_flush, PyObject_CallFunction(on_flush, "K", (unsigned long long)fi->fh)))
        pyfuse3_ops.flush(req, ino, fi);
}

/* -- requests that pyfuse3 does not know: answered later, by `reply_error` or `reply_offset` */

static const char *REQUEST = "qcowfs.request";

static void drop_request(PyObject *capsule) {
    if (PyCapsule_GetContext(capsule) == NULL)
        fuse_reply_err(PyCapsule_GetPointer(capsule, REQUEST), EIO);
}

/* Hand a request to a handler, whose number is an errno to answer with or None if it will answer itself. */
static void hand_over(PyObject *handler, fuse_req_t req, PyObject *arguments) {
    PyObject *capsule = PyCapsule_New(req, REQUEST, drop_request);
    PyObject *all = capsule == NULL || arguments == NULL ? NULL : PyTuple_New(PyTuple_GET_SIZE(arguments) + 1);
    PyObject *result = NULL;
    if (all != NULL) {
        Py_INCREF(capsule);
        PyTuple_SET_ITEM(all, 0, capsule);
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments); i++) {
            PyObject *item = PyTuple_GET_ITEM(arguments, i);
            Py_INCREF(item);
            PyTuple_SET_ITEM(all, i + 1, item);
        }
        result = PyObject_CallObject(handler, all);
    }
    if (result == NULL)
        no_answer(handler);
    Py_XDECREF(result);
    Py_XDECREF(all);
    Py_XDECREF(arguments);
    if (capsule == NULL)
        fuse_reply_err(req, ENOMEM);
    Py_XDECREF(capsule); /* answers, if the handler let go of it */
}

static void session_fallocate(
    fuse_req_t req, fuse_ino_t ino, int mode, off_t off, off_t length, struct fuse_file_info *fi) {
    (void)fi;
    hand_over(on_fallocate, req, Py_BuildValue(
        "(KiLL)", (unsigned long long)ino, mode, (long long)off, (long long)length));
}

static void session_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence, struct fuse_file_info *fi) {
    hand_over(on_lseek, req, Py_BuildValue(
        "(KKLi)", (unsigned long long)ino, (unsigned long long)fi->fh, (long long)off, whence));
}

static fuse_req_t take_request(PyObject *capsule) {
    fuse_req_t req = PyCapsule_GetPointer(capsule, REQUEST);
    if (req != NULL && PyCapsule_GetContext(capsule) != NULL) {
        PyErr_SetString(PyExc_ValueError, "the request is answered");
        return NULL;
    }
    if (req != NULL)
        PyCapsule_SetContext(capsule, capsule);
    return req;
}

static PyObject *reply_error(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule;
    int error;
    if (!PyArg_ParseTuple(args, "Oi", &capsule, &error))
        return NULL;
    fuse_req_t req = take_request(capsule);
    if (req == NULL)
        return NULL;
    fuse_reply_err(req, error);
    Py_RETURN_NONE;
}

static PyObject *reply_offset(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *capsule;
    long long offset;
    if (!PyArg_ParseTuple(args, "OL", &capsule, &offset))
        return NULL;
    fuse_req_t req = take_request(capsule);
    if (req == NULL)
        return NULL;
    fuse_reply_lseek(req, (off_t)offset);
    Py_RETURN_NONE;
}

/* -- the session */

static void session_init(void *userdata, struct fuse_conn_info *conn) {
    if (pyfuse3_ops.init != NULL)
        pyfuse3_ops.init(userdata, conn);
    conn->want &= ~(unsigned)FUSE_CAP_ATOMIC_O_TRUNC; /* then the kernel asks for the size, and is told it */
    conn->want &= ~(unsigned)FUSE_CAP_SPLICE_READ;    /* a request is one read, and its data lie in memory */
    conn->want |= conn->capable & FUSE_CAP_SPLICE_WRITE;
}

static size_t extended(const struct fuse_lowlevel_ops *ops, size_t size, struct fuse_lowlevel_ops *ours) {
    memset(&pyfuse3_ops, 0, sizeof pyfuse3_ops);
    memcpy(&pyfuse3_ops, ops, size < sizeof pyfuse3_ops ? size : sizeof pyfuse3_ops);
    *ours = pyfuse3_ops;
    ours->init = session_init;
    ours->read = session_read;
    ours->write_buf = session_write;
    ours->fsync = session_fsync;
    ours->flush = session_flush;
    ours->fallocate = session_fallocate;
    ours->lseek = session_lseek;
    return sizeof *ours;
}

struct fuse_session *fuse_session_new(
    struct fuse_args *args, const struct fuse_lowlevel_ops *ops, size_t size, void *userdata) {
    new_session *real = (new_session *)libfuse("fuse_session_new");
    struct fuse_lowlevel_ops ours;
    if (real == NULL)
        return NULL;
    if (on_read == NULL)
        return real(args, ops, size, userdata);
    size = extended(ops, size, &ours);
    return real(args, &ours, size, userdata);
}

/* The name that libfuse 3.17 and later gave to the same. */
struct fuse_session *fuse_session_new_versioned(
    struct fuse_args *args, const struct fuse_lowlevel_ops *ops, size_t size, void *version, void *userdata) {
    new_session_versioned *real = (new_session_versioned *)libfuse("fuse_session_new_versioned");
    struct fuse_lowlevel_ops ours;
    if (real == NULL)
        return NULL;
    if (on_read == NULL)
        return real(args, ops, size, version, userdata);
    size = extended(ops, size, &ours);
    return real(args, &ours, size, version, userdata);
}

typedef int receive_function(struct fuse_session *, struct fuse_buf *);
typedef void process_function(struct fuse_session *, const struct fuse_buf *);

static receive_function *real_receive(void) {
    static receive_function *real;
    if (real == NULL)
        real = (receive_function *)libfuse("fuse_session_receive_buf");
    return real;
}

/* As libfuse's, but a look that finds nothing is an interruption, after which pyfuse3 waits anew. */
int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buffer) {
    static int nonblocking = -1;
    int fd = fuse_session_fd(session);
    if (nonblocking != fd && on_read != NULL) {
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
        nonblocking = fd;
    }
    int got = real_receive()(session, buffer);
    if (now() - last_answer < LONGEST_WAIT_NS)
        patience = LONGEST_WAIT_NS; /* it would have paid to wait */
    return got == -EAGAIN ? -EINTR : got;
}

/* Look for the next request while its sender is likely to send it; 0 or less if there is none. */
static int receive_soon(struct fuse_session *session, struct fuse_buf *buffer) {
    long limit = under_way ? 0 : patience;
    struct pollfd request = {.fd = fuse_session_fd(session), .events = POLLIN};
    long start = now();
    int got;
    Py_BEGIN_ALLOW_THREADS
    while ((got = real_receive()(session, buffer)) == -EAGAIN && now() - start < limit)
        sched_yield(); /* the sender may need this very processor */
    if (got == -EAGAIN && !under_way && poll(&request, 1, LONGEST_SLEEP_MS) > 0)
        got = real_receive()(session, buffer);
    Py_END_ALLOW_THREADS
    if (got > 0 && now() - start < LONGEST_WAIT_NS)
        patience = LONGEST_WAIT_NS;
    else
        patience /= 2;
    return got;
}

void fuse_session_process_buf(struct fuse_session *session, const struct fuse_buf *buffer) {
    static process_function *real;
    if (real == NULL)
        real = (process_function *)libfuse("fuse_session_process_buf");
    long start = on_read == NULL ? 0 : now();
    answered = false;
    real(session, buffer);
    for (int i = 1; answered && i < MOST_IN_A_ROW && now() - start < LONGEST_ROW_NS; i++) {
        /* pyfuse3 handed in a buffer of its own, which is only called constant */
        if (receive_soon(session, (struct fuse_buf *)buffer) <= 0)
            break;
        answered = false;
        real(session, buffer);
    }
    end_permits();
    last_answer = now();
}

/* -- the module */

static PyObject *set_handlers(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *read, *write, *written, *fsync, *flush, *fallocate, *lseek;
    if (!PyArg_ParseTuple(args, "OOOOOOO", &read, &write, &written, &fsync, &flush, &fallocate, &lseek))
        return NULL;
    Py_INCREF(args); /* keeps them all, for as long as the process may serve */
    set_listener(written);
    on_read = read, on_write = write, on_fsync = fsync, on_flush = flush, on_fallocate = fallocate, on_lseek = lseek;
    Py_RETURN_NONE;
}

static PyObject *note_waiting(PyObject *self, PyObject *by) {
    (void)self;
    under_way += (int)PyLong_AsLong(by);
    if (PyErr_Occurred() != NULL)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"set_handlers", set_handlers, METH_VARARGS, "Answer requests by these functions."},
    {"permit_reads", permit_reads, METH_VARARGS, "Let clusters be read whose places are in a dictionary."},
    {"permit_writes", permit_writes, METH_VARARGS, "Let clusters be overwritten whose places are there."},
    {"note_waiting", note_waiting, METH_O, "Add to the number of requests that wait for the scheduler."},
    {"reply_error", reply_error, METH_VARARGS, "Answer a request with an errno, 0 for success."},
    {"reply_offset", reply_offset, METH_VARARGS, "Answer an lseek request with an offset."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_session", "libfuse's session with what pyfuse3 leaves out.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__session(void) {
    if (real_receive() == NULL) {
        PyErr_SetString(PyExc_ImportError, "libfuse3 is not loaded");
        return NULL;
    }
    PyObject *made = PyModule_Create(&module);
    if (made != NULL && PyModule_AddIntConstant(made, "INTERFACE", INTERFACE) < 0)
        Py_CLEAR(made);
    return made;
}
