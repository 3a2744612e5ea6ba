"""Gives the workers 100 mails at once: `python send.py 100`."""

import sys

from mailer import send_mail

for number in range(int(sys.argv[1])):
    send_mail.delay(f"customer-{number}@example.org", "News")
print(sys.argv[1], "mails were given to the workers", flush=True)
