"""eventlet's own WSGI server: patched before anything else is imported, as eventlet asks for."""

import eventlet

eventlet.monkey_patch()

if __name__ == "__main__":
    import sys

    import eventlet.wsgi
    from served_everything import app

    eventlet.wsgi.server(eventlet.listen(("127.0.0.1", int(sys.argv[1]))), app)
