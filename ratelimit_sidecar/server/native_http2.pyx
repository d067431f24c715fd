# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""A server's HTTP/2 session for `grpc_connection.Connection`, on libnghttp2 in C.

`native_http2.pyi` describes the interface. `portable_http2` is the same on the package ngh2, for installations without a
C compiler; a test compares the two. A request's headers stay one block of memory until they are read, and an answer is
one call.

Safety. nghttp2 calls back while it parses or writes. A callback never raises: one that fails makes nghttp2 fail with it,
and a session in which nghttp2 has failed neither parses nor writes again. Callbacks run only this module's code, so
nothing re-enters nghttp2. `_requests` owns the requests of open streams, and nghttp2 borrows them until the stream is
closed. Neither class refers to anything that could refer back. So both do without the garbage collector, which would
clear what nghttp2 still borrows.
"""

cimport cython
from collections import deque
from cpython.buffer cimport PyBUF_SIMPLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy

cdef extern from "nghttp2/nghttp2.h":
    ctypedef ptrdiff_t nghttp2_ssize
    ctypedef struct nghttp2_session:
        pass
    ctypedef struct nghttp2_session_callbacks:
        pass
    ctypedef struct nghttp2_option:
        pass
    ctypedef struct nghttp2_frame_hd:
        size_t length
        int32_t stream_id
        uint8_t type
        uint8_t flags
    ctypedef struct nghttp2_headers:
        int cat
    ctypedef struct nghttp2_ping:
        uint8_t opaque_data[8]
    ctypedef struct nghttp2_goaway:
        int32_t last_stream_id
        uint32_t error_code
    ctypedef union nghttp2_frame:
        nghttp2_frame_hd hd
        nghttp2_headers headers
        nghttp2_ping ping
        nghttp2_goaway goaway
    ctypedef struct nghttp2_nv:
        uint8_t *name
        uint8_t *value
        size_t namelen
        size_t valuelen
        uint8_t flags
    ctypedef struct nghttp2_settings_entry:
        int32_t settings_id
        uint32_t value
    ctypedef union nghttp2_data_source:
        int fd
        void *ptr
    ctypedef nghttp2_ssize (*nghttp2_data_source_read_callback2)(
        nghttp2_session *session, int32_t stream_id, uint8_t *buf, size_t length, uint32_t *data_flags,
        nghttp2_data_source *source, void *user_data) noexcept
    ctypedef struct nghttp2_data_provider2:
        nghttp2_data_source source
        nghttp2_data_source_read_callback2 read_callback

    int NGHTTP2_DATA, NGHTTP2_HEADERS, NGHTTP2_RST_STREAM, NGHTTP2_SETTINGS, NGHTTP2_PING, NGHTTP2_GOAWAY
    int NGHTTP2_FLAG_NONE, NGHTTP2_FLAG_END_STREAM, NGHTTP2_FLAG_ACK
    int NGHTTP2_HCAT_REQUEST
    int NGHTTP2_DATA_FLAG_EOF, NGHTTP2_DATA_FLAG_NO_END_STREAM
    int NGHTTP2_NV_FLAG_NO_COPY_NAME, NGHTTP2_NV_FLAG_NO_COPY_VALUE
    int NGHTTP2_ERR_CALLBACK_FAILURE, NGHTTP2_ERR_DEFERRED, NGHTTP2_ERR_PAUSE, NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
    int NGHTTP2_ERR_FLOODED, NGHTTP2_ERR_TOO_MANY_CONTINUATIONS, NGHTTP2_ERR_BAD_CLIENT_MAGIC
    int NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE
    int NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE

    int nghttp2_session_callbacks_new(nghttp2_session_callbacks **callbacks)
    void nghttp2_session_callbacks_del(nghttp2_session_callbacks *callbacks)
    void nghttp2_session_callbacks_set_on_begin_headers_callback(
        nghttp2_session_callbacks *callbacks,
        int (*callback)(nghttp2_session *, const nghttp2_frame *, void *) noexcept)
    void nghttp2_session_callbacks_set_on_header_callback(
        nghttp2_session_callbacks *callbacks,
        int (*callback)(nghttp2_session *, const nghttp2_frame *, const uint8_t *, size_t, const uint8_t *, size_t,
                        uint8_t, void *) noexcept)
    void nghttp2_session_callbacks_set_on_invalid_header_callback(
        nghttp2_session_callbacks *callbacks,
        int (*callback)(nghttp2_session *, const nghttp2_frame *, const uint8_t *, size_t, const uint8_t *, size_t,
                        uint8_t, void *) noexcept)
    void nghttp2_session_callbacks_set_on_data_chunk_recv_callback(
        nghttp2_session_callbacks *callbacks,
        int (*callback)(nghttp2_session *, uint8_t, int32_t, const uint8_t *, size_t, void *) noexcept)
    void nghttp2_session_callbacks_set_on_frame_recv_callback(
        nghttp2_session_callbacks *callbacks,
        int (*callback)(nghttp2_session *, const nghttp2_frame *, void *) noexcept)
    void nghttp2_session_callbacks_set_on_frame_send_callback(
        nghttp2_session_callbacks *callbacks,
        int (*callback)(nghttp2_session *, const nghttp2_frame *, void *) noexcept)
    void nghttp2_session_callbacks_set_on_stream_close_callback(
        nghttp2_session_callbacks *callbacks,
        int (*callback)(nghttp2_session *, int32_t, uint32_t, void *) noexcept)
    int nghttp2_option_new(nghttp2_option **option)
    void nghttp2_option_del(nghttp2_option *option)
    void nghttp2_option_set_no_auto_window_update(nghttp2_option *option, int value)
    void nghttp2_option_set_max_continuations(nghttp2_option *option, size_t value)
    void nghttp2_option_set_stream_reset_rate_limit(nghttp2_option *option, uint64_t burst, uint64_t rate)
    int nghttp2_session_server_new2(nghttp2_session **session, const nghttp2_session_callbacks *callbacks,
                                    void *user_data, const nghttp2_option *option)
    void nghttp2_session_del(nghttp2_session *session)
    nghttp2_ssize nghttp2_session_mem_recv2(nghttp2_session *session, const uint8_t *data, size_t length)
    nghttp2_ssize nghttp2_session_mem_send2(nghttp2_session *session, const uint8_t **data)
    int nghttp2_session_want_read(nghttp2_session *session)
    int nghttp2_session_want_write(nghttp2_session *session)
    int nghttp2_session_consume(nghttp2_session *session, int32_t stream_id, size_t size)
    int nghttp2_session_set_stream_user_data(nghttp2_session *session, int32_t stream_id, void *user_data)
    void *nghttp2_session_get_stream_user_data(nghttp2_session *session, int32_t stream_id)
    int nghttp2_session_set_local_window_size(nghttp2_session *session, uint8_t flags, int32_t stream_id,
                                              int32_t window_size)
    int nghttp2_session_resume_data(nghttp2_session *session, int32_t stream_id)
    int nghttp2_session_terminate_session(nghttp2_session *session, uint32_t error_code)
    int32_t nghttp2_session_get_last_proc_stream_id(nghttp2_session *session)
    int nghttp2_submit_settings(nghttp2_session *session, uint8_t flags, const nghttp2_settings_entry *entries,
                                size_t count)
    int nghttp2_submit_response2(nghttp2_session *session, int32_t stream_id, const nghttp2_nv *fields, size_t count,
                                 const nghttp2_data_provider2 *provider)
    int nghttp2_submit_trailer(nghttp2_session *session, int32_t stream_id, const nghttp2_nv *fields, size_t count)
    int nghttp2_submit_rst_stream(nghttp2_session *session, uint8_t flags, int32_t stream_id, uint32_t error_code)
    int nghttp2_submit_ping(nghttp2_session *session, uint8_t flags, const uint8_t *opaque_data)
    int nghttp2_submit_shutdown_notice(nghttp2_session *session)
    int nghttp2_submit_goaway(nghttp2_session *session, uint8_t flags, int32_t last_stream_id, uint32_t error_code,
                              const uint8_t *data, size_t length)


cdef enum:
    ENHANCE_YOUR_CALM = 0xB
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FRAME_PREFIX = 5  # of a gRPC message
    OVERSIZED_PARTS = 2  # headers of so many times the largest size are answered, not reset
    STEP_BYTES = 262_144  # of headers, decoded: 0.3 ms. A byte can stand for 4,000 of them (RFC 7541)
    FIRST_FIELDS = 512  # bytes; the headers of an ordinary call fit


class BrokenSession(Exception):
    def __init__(self, int code):
        super().__init__(code)
        self.code = code


@cython.final
@cython.no_gc
@cython.freelist(128)
cdef class Request:
    cdef readonly int stream_id
    cdef readonly bytes path
    cdef readonly bint is_plain_call
    cdef readonly bint may_be_sampled
    cdef readonly bint is_oversized
    cdef readonly bint ended
    cdef readonly bint lost
    cdef readonly bint is_answered
    cdef public bint is_wanted
    cdef readonly Py_ssize_t header_bytes
    cdef object _body  # bytes, or a bytearray once there is more than one part
    cdef Py_ssize_t _unconsumed
    cdef bint _is_listed
    # The headers, one after another: length of name, length of value, name, value.
    cdef char *_fields
    cdef size_t _fields_used, _fields_size
    cdef int _seen
    # The response.
    cdef bytes _message  # which is being sent
    cdef object _messages  # those after it: a deque, once there is one
    cdef Py_ssize_t _offset  # in _message and the prefix before it
    cdef Py_ssize_t _unsent
    cdef tuple _trailers
    cdef bint _is_open, _is_finished, _is_deferred, _is_sent

    def __cinit__(self):
        self.path = b""
        self._body = b""

    def __dealloc__(self):
        free(self._fields)

    @property
    def body_bytes(self):
        return len(self._body)

    def take_body(self):
        body = self._body
        self._body = b""
        return body if type(body) is bytes else bytes(body)

    def __iter__(self):
        return iter(self.headers())

    def headers(self):
        cdef size_t at = 0
        cdef uint32_t lengths[2]
        cdef list found = []
        while at < self._fields_used:
            memcpy(lengths, self._fields + at, sizeof(lengths))
            at += sizeof(lengths)
            found.append((
                PyBytes_FromStringAndSize(self._fields + at, lengths[0]),
                PyBytes_FromStringAndSize(self._fields + at + lengths[0], lengths[1]),
            ))
            at += lengths[0] + lengths[1]
        return tuple(found)

    def get(self, bytes name not None):
        cdef size_t at = 0
        cdef uint32_t lengths[2]
        cdef size_t length = PyBytes_GET_SIZE(name)
        cdef const char *wanted = PyBytes_AS_STRING(name)
        while at < self._fields_used:
            memcpy(lengths, self._fields + at, sizeof(lengths))
            at += sizeof(lengths)
            if lengths[0] == length and memcmp(self._fields + at, wanted, length) == 0:
                return PyBytes_FromStringAndSize(self._fields + at + lengths[0], lengths[1])
            at += lengths[0] + lengths[1]
        return None

    cdef void _forget_headers(self) noexcept:
        """It is answered. Until the client has taken the answer, the stream stays open and the request with it."""
        free(self._fields)
        self._fields = NULL
        self._fields_used = self._fields_size = 0
        self.path = b""

    cdef int _add_field(self, const uint8_t *name, size_t name_length, const uint8_t *value,
                        size_t value_length) except -1:
        cdef size_t needed = self._fields_used + 8 + name_length + value_length
        cdef size_t size
        cdef char *grown
        cdef uint32_t lengths[2]
        if needed > self._fields_size:
            size = 2 * self._fields_size if self._fields_size else FIRST_FIELDS
            while size < needed:
                size *= 2
            grown = <char *>realloc(self._fields, size)
            if grown == NULL:
                raise MemoryError()
            self._fields = grown
            self._fields_size = size
        lengths[0] = <uint32_t>name_length
        lengths[1] = <uint32_t>value_length
        memcpy(self._fields + self._fields_used, lengths, sizeof(lengths))
        memcpy(self._fields + self._fields_used + 8, name, name_length)
        memcpy(self._fields + self._fields_used + 8 + name_length, value, value_length)
        self._fields_used = needed
        return 0


cdef enum:  # Request._seen
    POST = 1
    GRPC = 2
    TRAILERS = 4


@cython.final
@cython.no_gc
cdef class Session:
    cdef nghttp2_session *_session
    cdef int _broken
    """The code for a GOAWAY, if nghttp2 has failed."""
    cdef dict _requests
    cdef list _changed
    cdef bytes _last_path
    cdef Py_ssize_t _max_header_bytes
    cdef readonly Py_ssize_t unsent
    cdef readonly long long taken
    cdef readonly int finished
    cdef readonly long long control_frames
    cdef readonly bint has_settings
    cdef bytes _unread  # taken by `receive`, not by nghttp2
    cdef Py_ssize_t _step_bytes, _block_bytes  # of headers, decoded: in this step, and of these headers
    cdef readonly bint has_more
    cdef Request _amid_headers  # whose headers have begun and are not complete
    cdef readonly bint said_goodbye
    cdef readonly bytes ponged
    cdef readonly int sent_goaway_code

    def __cinit__(self, *, uint32_t max_streams, int stream_window, int connection_window, Py_ssize_t max_header_bytes,
                  tuple resets not None):
        cdef nghttp2_session_callbacks *callbacks = NULL
        cdef nghttp2_option *option = NULL
        cdef nghttp2_settings_entry settings[3]
        cdef uint64_t burst, rate
        burst, rate = resets
        self._requests = {}
        self._changed = []
        self._last_path = self._unread = b""
        self.ponged = b""
        self._max_header_bytes = max_header_bytes
        try:
            if nghttp2_session_callbacks_new(&callbacks) or nghttp2_option_new(&option):
                raise MemoryError()
            nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, _on_begin_headers)
            nghttp2_session_callbacks_set_on_header_callback(callbacks, _on_header)
            nghttp2_session_callbacks_set_on_invalid_header_callback(callbacks, _on_invalid_header)
            nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, _on_data_chunk)
            nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, _on_frame_received)
            nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, _on_frame_sent)
            nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, _on_stream_closed)
            nghttp2_option_set_no_auto_window_update(option, 1)
            # A header list of the largest size, in frames of the least size that there is.
            nghttp2_option_set_max_continuations(option, max_header_bytes // 16_384 + 1)
            nghttp2_option_set_stream_reset_rate_limit(option, burst, rate)
            if nghttp2_session_server_new2(&self._session, callbacks, <void *>self, option):
                raise MemoryError()
        finally:
            nghttp2_session_callbacks_del(callbacks)
            nghttp2_option_del(option)
        settings[0].settings_id = NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS
        settings[0].value = max_streams
        settings[1].settings_id = NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE
        settings[1].value = stream_window
        settings[2].settings_id = NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE
        settings[2].value = <uint32_t>max_header_bytes
        if nghttp2_submit_settings(self._session, NGHTTP2_FLAG_NONE, settings, 3) or nghttp2_session_set_local_window_size(
            self._session, NGHTTP2_FLAG_NONE, 0, connection_window
        ):
            raise MemoryError()

    def __dealloc__(self):
        if self._session != NULL:
            nghttp2_session_del(self._session)

    @property
    def amid_headers_of(self):
        return 0 if self._amid_headers is None else self._amid_headers.stream_id

    @property
    def amid_header_bytes(self):
        return 0 if self._amid_headers is None else self._amid_headers._fields_size

    def receive(self, data):
        cdef Py_buffer view
        cdef nghttp2_ssize taken
        if self._broken:
            raise BrokenSession(self._broken)
        if self.has_more:
            data = self._unread + data
            self.has_more = False
        self._step_bytes = 0
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        taken = nghttp2_session_mem_recv2(self._session, <const uint8_t *>view.buf, view.len)
        if self.has_more and taken >= 0:
            self._unread = PyBytes_FromStringAndSize(<const char *>view.buf + taken, view.len - taken)
        PyBuffer_Release(&view)
        if taken < 0:
            self._broken = _code_of(<int>taken)
            raise BrokenSession(self._broken)
        return self._take_changed()

    def late(self):
        return self._take_changed()

    cdef list _take_changed(self):
        cdef list changed = self._changed
        cdef Request request
        if not changed:
            return []
        self._changed = []
        for request in changed:
            request._is_listed = False
        return changed

    def output(self):
        cdef const uint8_t *data
        cdef nghttp2_ssize length
        cdef char *buffer = NULL
        cdef size_t used = 0, size = 0
        cdef char *grown
        if self._broken:
            raise BrokenSession(self._broken)
        try:
            while True:
                length = nghttp2_session_mem_send2(self._session, &data)
                if length == 0:
                    break
                if length < 0:
                    self._broken = _code_of(<int>length)
                    raise BrokenSession(self._broken)
                if used + <size_t>length > size:
                    size = max(<size_t>4_096, 2 * size, used + <size_t>length)
                    grown = <char *>realloc(buffer, size)
                    if grown == NULL:
                        raise MemoryError()
                    buffer = grown
                memcpy(buffer + used, data, length)
                used += length
            return PyBytes_FromStringAndSize(buffer, used) if used else b""
        except MemoryError:
            # A part of the stream is missing now.
            self._broken = INTERNAL_ERROR
            raise BrokenSession(INTERNAL_ERROR) from None
        finally:
            free(buffer)

    @property
    def needs_replacing(self):
        return False

    @property
    def is_over(self):
        if self._broken:
            return True
        return not nghttp2_session_want_read(self._session) and not nghttp2_session_want_write(self._session)

    # What follows does nothing when the stream is closed or the session ends. It only puts frames into nghttp2's queue,
    # so it does no harm to a broken session either.

    cpdef void answer(self, Request request, bytes message):
        if self.begin(request):
            self.send(request, message)
            self.finish(request, OK_TRAILERS)

    cpdef bint begin(self, Request request) except -1:
        cdef nghttp2_data_provider2 provider
        if request is None:
            raise TypeError("a request is needed")
        if request.lost or request.is_answered:
            return False
        request.is_answered = True
        provider.source.ptr = NULL
        provider.read_callback = _read_response
        request._is_open = nghttp2_submit_response2(self._session, request.stream_id, _grpc_headers, 2, &provider) == 0
        return request._is_open

    cpdef void send(self, Request request, bytes message):
        if request is None or message is None:
            raise TypeError("a request and a message are needed")
        if not request._is_open or request._is_finished:
            return
        if request._message is None:
            request._message = message
            request._offset = 0
        else:
            if request._messages is None:
                request._messages = deque()
            request._messages.append(message)
        request._unsent += FRAME_PREFIX + PyBytes_GET_SIZE(message)
        self.unsent += FRAME_PREFIX + PyBytes_GET_SIZE(message)
        self._resume(request)

    cpdef void finish(self, Request request, tuple trailers):
        if request is None or trailers is None:
            raise TypeError("a request and trailers are needed")
        if trailers is not OK_TRAILERS:
            # They are submitted when all before them is sent. What is wrong with them is better said now.
            free(_fields_of(trailers))
        request._forget_headers()
        if request._is_open and not request._is_finished:
            request._trailers = trailers
            request._is_finished = True
            self.finished += 1
            self._resume(request)

    def respond(self, Request request not None, tuple headers not None, bytes body not None=b""):
        cdef nghttp2_data_provider2 provider
        cdef nghttp2_nv *fields
        cdef int failed
        if request.lost or request.is_answered:
            return
        fields = _fields_of(headers)
        request.is_answered = True
        request._is_finished = True
        self.finished += 1
        request._forget_headers()
        provider.source.ptr = NULL
        provider.read_callback = _read_response
        failed = nghttp2_submit_response2(self._session, request.stream_id, fields, len(headers),
                                          &provider if body else NULL)
        free(fields)
        if body and not failed:
            request._message = body
            request._offset = FRAME_PREFIX
            request._unsent = PyBytes_GET_SIZE(body)
            self.unsent += request._unsent
        if not request.is_wanted:
            self.consume(request, request._unconsumed)

    def unsent_of(self, Request request not None):
        return request._unsent

    def has_sent_all(self, Request request not None):
        return request.lost or request._is_sent

    def reset(self, Request request not None, uint32_t code):
        if not request.lost:
            nghttp2_submit_rst_stream(self._session, NGHTTP2_FLAG_NONE, request.stream_id, code)

    cpdef void consume(self, Request request, Py_ssize_t count):
        if request is None:
            raise TypeError("a request is needed")
        count = min(count, request._unconsumed)
        if count > 0:
            request._unconsumed -= count
            nghttp2_session_consume(self._session, request.stream_id, count)

    def ping(self, bytes payload not None):
        if PyBytes_GET_SIZE(payload) != 8:
            raise ValueError("a PING carries 8 bytes")
        nghttp2_submit_ping(self._session, NGHTTP2_FLAG_NONE, <const uint8_t *>PyBytes_AS_STRING(payload))

    def send_shutdown_notice(self):
        nghttp2_submit_shutdown_notice(self._session)

    def send_goaway(self):
        nghttp2_submit_goaway(self._session, NGHTTP2_FLAG_NONE,
                              nghttp2_session_get_last_proc_stream_id(self._session), 0, NULL, 0)

    def terminate(self, uint32_t code):
        nghttp2_session_terminate_session(self._session, code)

    cdef void _resume(self, Request request) noexcept:
        if request._is_deferred:
            request._is_deferred = False
            nghttp2_session_resume_data(self._session, request.stream_id)

    cdef int _note(self, Request request) except -1:
        """Return the request once, when the current bytes are taken."""
        if not request._is_listed:
            request._is_listed = True
            self._changed.append(request)
        return 0


OK_TRAILERS = ((b"grpc-status", b"0"),)

cdef nghttp2_nv _grpc_headers[2]
cdef nghttp2_nv _ok_trailers[1]


cdef void _set(nghttp2_nv *field, const char *name, size_t name_length, const char *value, size_t value_length) noexcept:
    field.name = <uint8_t *>name
    field.namelen = name_length
    field.value = <uint8_t *>value
    field.valuelen = value_length
    field.flags = NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE


_set(&_grpc_headers[0], ":status", 7, "200", 3)
_set(&_grpc_headers[1], "content-type", 12, "application/grpc", 16)
_set(&_ok_trailers[0], "grpc-status", 11, "0", 1)


cdef nghttp2_nv *_fields_of(tuple headers) except NULL:
    """To be freed. It borrows the bytes of the headers; nghttp2 copies them when they are submitted."""
    cdef nghttp2_nv *fields = <nghttp2_nv *>malloc(max(1, len(headers)) * sizeof(nghttp2_nv))
    cdef Py_ssize_t index
    cdef bytes name, value
    if fields == NULL:
        raise MemoryError()
    try:
        for index in range(len(headers)):
            name, value = headers[index]
            if name is None or value is None:
                raise TypeError("headers are pairs of bytes")
            fields[index].name = <uint8_t *>PyBytes_AS_STRING(name)
            fields[index].namelen = PyBytes_GET_SIZE(name)
            fields[index].value = <uint8_t *>PyBytes_AS_STRING(value)
            fields[index].valuelen = PyBytes_GET_SIZE(value)
            fields[index].flags = 0
    except BaseException:
        free(fields)
        raise
    return fields


cdef int _code_of(int error) noexcept:
    if error == NGHTTP2_ERR_FLOODED or error == NGHTTP2_ERR_TOO_MANY_CONTINUATIONS:
        return ENHANCE_YOUR_CALM
    if error == NGHTTP2_ERR_BAD_CLIENT_MAGIC:
        return PROTOCOL_ERROR
    return INTERNAL_ERROR


cdef Request _request_of(nghttp2_session *session, int32_t stream_id):
    cdef void *found = nghttp2_session_get_stream_user_data(session, stream_id)
    return None if found == NULL else <Request>found


cdef int _on_begin_headers(nghttp2_session *session, const nghttp2_frame *frame, void *user_data) noexcept:
    cdef Session self = <Session>user_data
    cdef Request request
    self._block_bytes = 0
    if frame.hd.type != NGHTTP2_HEADERS or frame.headers.cat != NGHTTP2_HCAT_REQUEST:
        return 0
    try:
        request = Request.__new__(Request)
        request.stream_id = frame.hd.stream_id
        self._amid_headers = request
        self._requests[request.stream_id] = request
        return nghttp2_session_set_stream_user_data(session, request.stream_id, <void *>request)
    except BaseException:
        return NGHTTP2_ERR_CALLBACK_FAILURE


cdef int _count_field(Session self, Py_ssize_t size) noexcept:
    """What the callback for a header returns, unless that failed."""
    self._block_bytes += size
    if self._block_bytes > OVERSIZED_PARTS * self._max_header_bytes:
        # The stream is reset, and nghttp2 looks at no more of these headers.
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
    self._step_bytes += size
    if self._step_bytes > STEP_BYTES:
        self.has_more = True
        return NGHTTP2_ERR_PAUSE
    return 0


cdef int _on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_length,
                    const uint8_t *value, size_t value_length, uint8_t flags, void *user_data) noexcept:
    cdef Session self = <Session>user_data
    cdef Request request
    cdef Py_ssize_t size = name_length + value_length + 32
    cdef int result = _count_field(self, size)
    if result == NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE or frame.headers.cat != NGHTTP2_HCAT_REQUEST:
        # Trailers say nothing to a gRPC server.
        return result
    try:
        request = _request_of(session, frame.hd.stream_id)
        if request is None:
            return result
        request.header_bytes += size
        if request.header_bytes > self._max_header_bytes:
            request.is_oversized = True
            request._forget_headers()
            return result
        request._add_field(name, name_length, value, value_length)
        if name_length == 5 and memcmp(name, b":path", 5) == 0:
            if value_length == <size_t>PyBytes_GET_SIZE(self._last_path) and memcmp(
                value, PyBytes_AS_STRING(self._last_path), value_length
            ) == 0:
                request.path = self._last_path
            else:
                request.path = PyBytes_FromStringAndSize(<const char *>value, value_length)
                if value_length <= 1_024:
                    self._last_path = request.path
        elif name_length == 7 and memcmp(name, b":method", 7) == 0:
            if value_length == 4 and memcmp(value, b"POST", 4) == 0:
                request._seen |= POST
        elif name_length == 11 and memcmp(name, b"traceparent", 11) == 0:
            # The low bit of a digit is that of its character, but for the letters, where it is the other.
            if value_length > 54 and (value[54] & 1) ^ (value[54] >= 97):
                request.may_be_sampled = True
        elif (name_length == 2 and memcmp(name, b"b3", 2) == 0) or (
            name_length == 12 and memcmp(name, b"x-b3-traceid", 12) == 0
        ):
            request.may_be_sampled = True
        elif name_length == 12 and memcmp(name, b"content-type", 12) == 0:
            if value_length == 16 and memcmp(value, b"application/grpc", 16) == 0:
                request._seen |= GRPC
        elif name_length == 2 and memcmp(name, b"te", 2) == 0:
            if value_length == 8 and memcmp(value, b"trailers", 8) == 0:
                request._seen |= TRAILERS
        return result
    except BaseException:
        return NGHTTP2_ERR_CALLBACK_FAILURE


cdef int _on_invalid_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name,
                            size_t name_length, const uint8_t *value, size_t value_length, uint8_t flags,
                            void *user_data) noexcept:
    # It is left out. Envoy's tracers copy a client's tracestate, with blanks around it, and a call that failed would
    # pass.
    return _count_field(<Session>user_data, name_length + value_length + 32)


cdef int _on_data_chunk(nghttp2_session *session, uint8_t flags, int32_t stream_id, const uint8_t *data, size_t length,
                        void *user_data) noexcept:
    cdef Session self = <Session>user_data
    cdef Request request
    try:
        request = _request_of(session, stream_id)
        if request is None:
            nghttp2_session_consume(session, stream_id, length)
            return 0
        request._unconsumed += length
        if request.is_answered and not request.is_wanted:
            # It is no longer looked at.
            self.consume(request, length)
        elif not len(request._body):
            request._body = PyBytes_FromStringAndSize(<const char *>data, length)
        else:
            if type(request._body) is bytes:
                request._body = bytearray(request._body)
            request._body += PyBytes_FromStringAndSize(<const char *>data, length)
        return 0
    except BaseException:
        return NGHTTP2_ERR_CALLBACK_FAILURE


cdef int _on_frame_received(nghttp2_session *session, const nghttp2_frame *frame, void *user_data) noexcept:
    cdef Session self = <Session>user_data
    cdef Request request
    cdef int kind = frame.hd.type
    try:
        if kind == NGHTTP2_HEADERS:
            self._amid_headers = None
        if kind == NGHTTP2_HEADERS or kind == NGHTTP2_DATA:
            request = _request_of(session, frame.hd.stream_id)
            if request is None:
                self.control_frames += 1
                return 0
            if kind == NGHTTP2_HEADERS and frame.headers.cat == NGHTTP2_HCAT_REQUEST:
                request.is_plain_call = request._seen == (POST | GRPC | TRAILERS) and not request.is_oversized
                self._note(request)
            elif kind == NGHTTP2_DATA and not frame.hd.length and not frame.hd.flags & NGHTTP2_FLAG_END_STREAM:
                self.control_frames += 1
            if frame.hd.flags & NGHTTP2_FLAG_END_STREAM:
                request.ended = True
                if not request.is_wanted:
                    self.consume(request, request._unconsumed)
            if request.is_wanted:
                self._note(request)
            return 0
        self.control_frames += 1
        if kind == NGHTTP2_SETTINGS:
            if not frame.hd.flags & NGHTTP2_FLAG_ACK:
                self.has_settings = True
        elif kind == NGHTTP2_PING:
            if frame.hd.flags & NGHTTP2_FLAG_ACK:
                self.ponged = PyBytes_FromStringAndSize(<const char *>frame.ping.opaque_data, 8)
        elif kind == NGHTTP2_GOAWAY:
            self.said_goodbye = True
        return 0
    except BaseException:
        return NGHTTP2_ERR_CALLBACK_FAILURE


cdef int _on_frame_sent(nghttp2_session *session, const nghttp2_frame *frame, void *user_data) noexcept:
    if frame.hd.type == NGHTTP2_GOAWAY:
        (<Session>user_data).sent_goaway_code = frame.goaway.error_code
    return 0


cdef int _on_stream_closed(nghttp2_session *session, int32_t stream_id, uint32_t error_code, void *user_data) noexcept:
    cdef Session self = <Session>user_data
    cdef Request request
    try:
        request = self._requests.pop(stream_id, None)
        if request is None:
            return 0
        if self._amid_headers is request:
            self._amid_headers = None
        nghttp2_session_set_stream_user_data(session, stream_id, NULL)
        request.lost = True
        self.unsent -= request._unsent
        self.taken += request._unsent
        request._unsent = 0
        if request._is_finished:
            self.finished -= 1
        request._is_open = False
        request._message = None
        request._messages = None
        if request._unconsumed:
            # Of a frame that the end of the stream has cut short.
            self.consume(request, request._unconsumed)
        if request.is_wanted:
            self._note(request)
        return 0
    except BaseException:
        return NGHTTP2_ERR_CALLBACK_FAILURE


cdef nghttp2_ssize _read_response(nghttp2_session *session, int32_t stream_id, uint8_t *buffer, size_t length,
                                  uint32_t *data_flags, nghttp2_data_source *source, void *user_data) noexcept:
    """Put messages, each behind its prefix, into a frame; at the end the trailers."""
    cdef Session self = <Session>user_data
    cdef Request request
    cdef Py_ssize_t size, count, copied = 0, room = <Py_ssize_t>length
    cdef nghttp2_nv *fields
    cdef int result = 0
    try:
        request = _request_of(session, stream_id)
        if request is None:
            return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
        while request._message is not None and copied < room:
            size = PyBytes_GET_SIZE(request._message)
            while request._offset < FRAME_PREFIX and copied < room:
                # A flag (not compressed), and the length in four bytes.
                buffer[copied] = 0 if request._offset == 0 else (size >> (8 * (4 - request._offset))) & 0xFF
                request._offset += 1
                copied += 1
            count = min(size + FRAME_PREFIX - request._offset, room - copied)
            if count > 0:
                memcpy(buffer + copied, PyBytes_AS_STRING(request._message) + request._offset - FRAME_PREFIX, count)
                copied += count
                request._offset += count
            if request._offset == size + FRAME_PREFIX:
                request._message = request._messages.popleft() if request._messages else None
                request._offset = 0
        request._unsent -= copied
        self.unsent -= copied
        self.taken += copied
        if request._message is not None:
            return copied
        if not request._is_finished:
            if copied:
                return copied
            request._is_deferred = True
            return NGHTTP2_ERR_DEFERRED
        data_flags[0] |= NGHTTP2_DATA_FLAG_EOF
        request._is_sent = True
        if request._trailers is None:
            return copied
        data_flags[0] |= NGHTTP2_DATA_FLAG_NO_END_STREAM
        if request._trailers is OK_TRAILERS:
            result = nghttp2_submit_trailer(session, stream_id, _ok_trailers, 1)
        else:
            fields = _fields_of(request._trailers)
            result = nghttp2_submit_trailer(session, stream_id, fields, len(request._trailers))
            free(fields)
        return NGHTTP2_ERR_CALLBACK_FAILURE if result else copied
    except BaseException:
        return NGHTTP2_ERR_CALLBACK_FAILURE
