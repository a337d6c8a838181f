"""`jaxserve.server` with the echo engine in place of a model, for tests that need a whole process.

    python -m tests.server.echo_server CONTROL TOKENIZER [--gin.BINDING=VALUE ...]

Lines of standard input control the engine: pause, allow N, resume, wait N (for N requests), die REASON, state STATE
(healthy, stuck or silent), problem LINE (of its end). CONTROL is what starting it does: run, "fail REASON", or hang.
"""

import sys
import threading

from jaxserve import server
from jaxserve.serving import server_run
from tests.server.fakes import EchoEngine

PORTS = ("--gin.ServerConfig.port=0", "--gin.ServerConfig.http_port=0")


def start_engine(control: str) -> EchoEngine:
    word, _, reason = control.partition(" ")
    if word == "fail":
        raise ValueError(reason)
    if word == "hang":
        print("hanging", file=sys.stderr, flush=True)
        threading.Event().wait()
    engine = EchoEngine()
    threading.Thread(target=obey, args=(engine,), daemon=True).start()
    return engine


def obey(engine: EchoEngine) -> None:
    for line in sys.stdin:
        match line.split(maxsplit=1):
            case ["pause"]:
                engine.pause()
            case ["allow", count]:
                engine.allow(int(count))
            case ["wait", count]:
                engine.wait_for_requests(int(count))
            case ["resume"]:
                engine.resume()
            case ["state", state]:
                engine.state = state.strip()
            case ["problem", problem]:
                engine.problem = problem.strip()
            case ["die", reason]:
                engine.die(reason.strip())
        print("obeyed", file=sys.stderr, flush=True)


if __name__ == "__main__":
    control, tokenizer, *overrides = sys.argv[1:]
    server_run.launch_engine = lambda config: server_run.Launch(lambda: start_engine(control))
    bindings = [f"--gin.EngineConfig.tokenizer='{tokenizer}'", *PORTS, *overrides]
    sys.exit(server.main(["--config", "tiny.gin", *bindings]))
