"""What the tests of the baselines share: requests on the tiny task, runs on it, accuracies of a role."""

from expunge.context import Context
from expunge.method import build_recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn

CLASS = ForgetRequest.label("ant")
SAMPLES = ForgetRequest.samples(range(16))


def context(task, request=CLASS):
    return Context(task, task.split(request))


def accuracies(task, request=CLASS):
    found = {}
    for role in ("forget", "retain", "test"):
        logits, labels = task.logits(role, task.split(request))
        found[role] = float((logits.argmax(1) == labels).float().mean())
    return found


def run(task, name, request=CLASS, *, epochs=None, lr=None, optim=None, **settings):
    given = {k: v for k, v in {"epochs": epochs, "lr": lr, "augment": False}.items() if v is not None}
    spec = {"method": name, "batch_size": 20, "optim": {**given, **(optim or {})}, **settings}
    return unlearn(task, request, build_recipe(spec), inplace=True)
