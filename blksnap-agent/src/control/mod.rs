//! Control: HTTP/JSON on a unix socket.
