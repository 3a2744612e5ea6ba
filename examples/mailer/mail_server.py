"""A mail server for the example: it keeps each mail in a folder, delivers none, and says each second how many came."""

import os
import re
import time
from collections import Counter
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread

workers: list[str] = []  # that each mail came from


class Session(StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"220 example\r\n")
        for line in self.rfile:
            self.wfile.write({b"DATA": b"354 go on\r\n", b"QUIT": b"221 bye\r\n"}.get(line[:4].upper(), b"250 yes\r\n"))
            if line[:4].upper() == b"DATA":
                self.keep()

    def keep(self) -> None:
        mail = b""
        for line in self.rfile:
            if line == b".\r\n":
                Path(os.environ["MAIL_FOLDER"], f"{time.time_ns()}.eml").write_bytes(mail)
                workers.extend(re.findall(r"(?m)^X-Worker: (\S+)", mail.decode()))
                self.wfile.write(b"250 kept\r\n")
                return
            mail += line


if __name__ == "__main__":
    with ThreadingTCPServer(("127.0.0.1", int(os.environ["MAIL_PORT"])), Session) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        said = 0
        while True:
            time.sleep(1)
            if new := workers[said:]:
                said += len(new)
                who = ", ".join(f"{count} from {worker}" for worker, count in sorted(Counter(new).items()))
                print(f"{time.strftime('%X')} {'#' * len(new):20} {len(new)} mails, {who}; {said} in all", flush=True)
