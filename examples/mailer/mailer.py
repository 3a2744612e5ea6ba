"""A mailer to copy from: mails limited over all workers, and a nightly digest. README.md says how to run it."""

from __future__ import annotations

import os
import smtplib
from email.message import EmailMessage

from celery import Celery, Task
from celery.schedules import crontab

from govredis import GovRedis
from govredis.contrib.celery import apply_reserved, exclusive, init_celery, rate_limited

RATE = os.environ.get("MAIL_RATE", "20/10 seconds")  # all that the mail server takes from us
READERS = [f"reader-{number}@example.org" for number in range(3)]  # a table of yours

gov = GovRedis.from_env()  # REDIS_URL, GOVREDIS_DATABASE_URL, GOVREDIS_PARKING_URL, ...
app = Celery("mailer", broker=os.environ["CELERY_BROKER_URL"])
app.conf.update(
    # A broker that hangs blocks `delay` for a second, not for as long as it hangs.
    broker_transport_options={"socket_timeout": 1, "socket_connect_timeout": 1, "max_retries": 0},
    task_publish_retry=False,
    # A message is gone when its task has ended: the mail of a killed worker is sent all the same, perhaps twice.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    beat_schedule={"digest": {"task": "mailer.send_digest", "schedule": crontab(hour=3, minute=0)}},
)
init_celery(app, gov)


@app.task(bind=True, autoretry_for=(OSError,), retry_backoff=True, max_retries=20)  # while the mail server is away
@rate_limited(RATE, key="mail", operation="mail")  # a mail too many waits in Redis, and keeps no worker
def send_mail(self: Task, to: str, subject: str) -> None:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "shop@example.org", to, subject
    message["X-Worker"] = self.request.hostname  # to show who sent it
    message.set_content("Hello!\n")
    with smtplib.SMTP("127.0.0.1", int(os.environ["MAIL_PORT"]), timeout=30) as server:
        server.send_message(message)


@app.task
@exclusive("digest", ttl=60, on_conflict="skip")  # one at a time over all workers
@rate_limited("1/20 hours", key="digest", operation="digest", on_limit="skip")  # nor a second one afterwards
def send_digest() -> None:
    for reader in READERS:
        apply_reserved(send_mail.s(reader, "Your digest"))  # published when there is room for it
