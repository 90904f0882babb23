"""A chat endpoint for tests, that behaves and misbehaves."""

import http.server
import json
import threading


class Service:
    """A chat endpoint that answers as `answer(request, number)` says: (status, body, its headers if any).

    A body that is no bytes is sent piece by piece, until the client hangs up.
    """

    def __init__(self, answer):
        self.requests, self.headers, self.together, self.most_together = [], [], 0, 0
        lock = threading.Lock()
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    service.requests.append((self.path, content))
                    service.headers.append(dict(self.headers))
                    service.together += 1
                    service.most_together = max(service.most_together, service.together)
                    number = len(service.requests)
                status, body, *more = answer(content, number)
                with lock:
                    service.together -= 1
                try:
                    self.send_response(status)
                    for name, value in dict(*more).items():
                        self.send_header(name, value)
                    if isinstance(body, bytes):
                        self.send_header("Content-Length", str(len(body)))
                        body = [body]
                    self.end_headers()
                    for piece in body:
                        self.wfile.write(piece)
                except OSError:
                    pass  # the client has given up

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def says(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
