/* Reads and writes of clusters whose place is known, answered without a call into Python. */
#ifndef QCOWFS_IN_PLACE_H
#define QCOWFS_IN_PLACE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define FUSE_USE_VERSION 31
#define _FILE_OFFSET_BITS 64
#include <fuse_lowlevel.h>
#include <stdbool.h>

/* Whether the request was answered; if not, a handler has to. */
bool read_in_place(fuse_req_t req, size_t size, off_t off, const struct fuse_file_info *fi);
bool write_in_place(fuse_req_t req, const void *data, size_t size, off_t off, const struct fuse_file_info *fi);

void end_permits(void);      /* at the end of a row: whatever runs next may change every place */
void end_write_permit(void); /* before a handler writes: it hears of what was written without it */

/* For the module: permit(fh, places, cluster_bits, fd, end) and, once, whom to tell of what was written. */
PyObject *permit_reads(PyObject *self, PyObject *args);
PyObject *permit_writes(PyObject *self, PyObject *args);
void set_listener(PyObject *on_written); /* borrowed */

#endif
