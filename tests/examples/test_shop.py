"""The shop of examples/, in a browser: it does what its README says, also while Redis is away."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import closing
from http.client import HTTPConnection, HTTPMessage
from http.cookies import SimpleCookie
from typing import Any, NamedTuple
from urllib.parse import urlencode

import psycopg2
import pytest
from checkout import Checkout
from support import PATIENT, eventually, in_threads
from werkzeug.security import generate_password_hash

from govredis import Config, GovRedis
from govredis.testing._base_server import free_port

pytestmark = pytest.mark.once


class Answer(NamedTuple):
    status: int
    headers: HTTPMessage
    text: str


class Browser:
    """Keeps cookies, and sends forms with the token of the page that it saw last."""

    def __init__(self, shop: Shop, address: str = "127.0.0.1") -> None:
        self._port, self._address = shop.port, address
        self.cookies: dict[str, str] = {}
        self.token = ""

    def get(self, path: str) -> Answer:
        return self._ask("GET", path, None)

    def post(self, path: str, **fields: str) -> Answer:
        return self._ask("POST", path, urlencode({"token": self.token, **fields}))

    def log_in(self, user: str, password: str = "sesame") -> Answer:
        self.get("/login")
        answer = self.post("/login", user=user, password=password)
        if answer.status == 302:
            self.get(answer.headers["Location"])
        return answer

    def _ask(self, method: str, path: str, body: str | None) -> Answer:
        headers = {
            "Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items()),
            "Accept": "text/html",
        }
        if body is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        with closing(HTTPConnection("127.0.0.1", self._port, source_address=(self._address, 0))) as connection:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            answer = Answer(response.status, response.headers, response.read().decode())
        for line in answer.headers.get_all("Set-Cookie") or ():
            self.cookies.update((name, each.value) for name, each in SimpleCookie(line).items())
        if found := re.search('name="token" value="([^"]+)"', answer.text):
            self.token = found[1]
        return answer


class Shop:
    """The running site, and its database as psql shows it."""

    def __init__(self, checkout: Checkout, port: int) -> None:
        self.checkout, self.port = checkout, port
        self.database_url = checkout.printed("GOVREDIS_DATABASE_URL")

    def sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with closing(psycopg2.connect(self.database_url)) as db, db, db.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def browser_of(self, customer: str) -> Browser:
        """The browser of a new customer, who is logged in."""
        self.sql("INSERT INTO customers VALUES (%s, %s)", customer, generate_password_hash("sesame", "pbkdf2:sha256:1"))
        browser = Browser(self)
        assert browser.log_in(customer).status == 302
        return browser

    def product(self, id_: int, stock: int) -> str:
        """A new product. Returns the path to order it."""
        self.sql("INSERT INTO products VALUES (%s, %s, 100, %s)", id_, f"Product {id_}", stock)
        return f"/products/{id_}/order"


@pytest.fixture(scope="module")
def shop(check_out: Callable[[Mapping[str, str]], Checkout], system_binary: Callable[[str], str]) -> Shop:
    system_binary("curl")
    port = free_port()
    checkout = check_out({"FLASK_RUN_PORT": str(port)})
    checkout.change("shop/README.md", ":5000", f":{port}")
    # Few logins, for a password takes its time, and an hour, for a machine may stall.
    checkout.change("shop/shop.py", "20/minute", "3/hour")
    checkout.change("shop/shop.py", "5/minute", "2/hour")
    checkout.follow("shop/README.md")
    return Shop(checkout, port)


def test_a_customer_logs_in_and_out(shop: Shop) -> None:
    browser = Browser(shop)
    assert "Log in" in browser.get("/").text
    assert browser.log_in("ada", "open").status == 403
    assert browser.log_in("ada").headers["Location"] == "/"
    assert "Hello ada" in browser.get("/").text
    session = browser.cookies["govredis_session"]
    browser.post("/logout")
    assert "Hello" not in browser.get("/").text
    browser.cookies["govredis_session"] = session  # that somebody has kept
    assert "Hello" not in browser.get("/").text


def test_a_stranger_who_orders_is_sent_to_the_login(shop: Shop) -> None:
    stranger = Browser(shop)
    stranger.get("/login")
    answer = stranger.post("/products/1/order")
    assert (answer.status, answer.headers["Location"]) == (302, "/login")


def test_failed_logins_are_limited_by_name(shop: Shop) -> None:
    stranger = Browser(shop, "127.0.0.2")
    assert [stranger.log_in("mallory", "guess").status for _ in range(3)] == [403, 403, 429]
    refused = stranger.log_in("mallory", "guess")
    assert int(refused.headers["Retry-After"]) > 0
    others = [Browser(shop, "127.0.0.2").log_in("bob").status for _ in range(3)]
    assert others == [302] * 3, "only failures count, and those of others do not"


def test_failed_logins_are_limited_by_address(shop: Shop) -> None:
    stranger = Browser(shop, "127.0.0.3")
    assert [stranger.log_in(f"name-{number}", "guess").status for number in range(4)] == [403] * 3 + [429]
    assert stranger.log_in("bob").status == 429
    assert Browser(shop).log_in("bob").status == 302


def test_orders_are_limited_by_customer(shop: Shop) -> None:
    order = shop.product(100, stock=50)
    carol, dan = shop.browser_of("carol"), shop.browser_of("dan")
    answers = [carol.post(order) for _ in range(11)]
    assert [answer.status for answer in answers] == [302] * 10 + [429]
    assert int(answers[-1].headers["Retry-After"]) > 0
    assert dan.post(order).status == 302
    assert shop.sql(
        "SELECT customer, count(*) FROM orders WHERE product = 100 GROUP BY customer ORDER BY customer"
    ) == [
        ("carol", 10),
        ("dan", 1),
    ]


def test_the_last_item_is_sold_and_paid_once(shop: Shop) -> None:
    order = shop.product(101, stock=1)
    buyers = {name: shop.browser_of(name) for name in ("erin", "finn", "gus", "hal", "ida")}
    answers = in_threads(*(lambda browser=browser: browser.post(order) for browser in buyers.values()))
    # 503: this buyer waited for the lock for five seconds, where the machine stalled.
    assert sorted(answer.status for answer in answers if answer.status != 503)[0] == 302
    assert {answer.status for answer in answers} <= {302, 409, 503}
    (buyer,) = [row[0] for row in shop.sql("SELECT customer FROM orders WHERE product = 101")]
    assert shop.sql("SELECT customer FROM payments WHERE customer = ANY(%s)", list(buyers)) == [(buyer,)]
    assert buyers[buyer].post(order).status == 409
    assert "sold out" in buyers[buyer].get("/").text


def test_a_form_without_this_browsers_token_is_refused(shop: Shop) -> None:
    order = shop.product(102, stock=5)
    victim, attacker = shop.browser_of("vera"), shop.browser_of("mike")
    assert attacker.token != victim.token
    for token in "", attacker.token, "tökén":
        assert victim.post(order, token=token).status == 400
    victim.cookies.pop("session")
    assert victim.post(order, token="").status == 400
    assert shop.sql("SELECT count(*) FROM orders WHERE product = 102") == [(0,)]


def test_prices_come_from_the_cache_and_follow_the_table(shop: Shop) -> None:
    shop.product(103, stock=7)
    browser = Browser(shop)
    with GovRedis(
        Config(redis_url=shop.checkout.printed("REDIS_URL"), database_url=shop.database_url, **PATIENT)
    ) as gov:
        cached = gov.cache("product")
        row = {"id": 103, "name": "Product 103", "cents": 100, "stock": 7}
        eventually(lambda: browser.get("/") and cached.get(103) == row, what="the row is cached")
        shop.sql("UPDATE products SET cents = 98765 WHERE id = 103")
        eventually(lambda: "987.65" in browser.get("/").text, what="the page shows the new price")


def test_the_buyer_sees_the_new_stock_at_once(shop: Shop) -> None:
    order = shop.product(104, stock=7042)
    browser = shop.browser_of("nina")
    assert "7042 left" in browser.get("/").text
    assert browser.post(order).status == 302
    assert "7041 left" in browser.get("/").text


def test_the_shop_goes_on_while_redis_is_away(shop: Shop) -> None:
    order = shop.product(105, stock=11)
    browser = shop.browser_of("olga")
    shop.checkout.type("Enter", "Redis is away")
    try:
        assert "Hello olga" in browser.get("/").text
        # For a second after the kill a lock is busy: nobody knows yet for how long Redis is away.
        eventually(lambda: browser.post(order).status == 302)
        assert "10 left" in browser.get("/").text
        eventually(lambda: '"warn"' in browser.get("/govredis/ready").text)
    finally:
        shop.checkout.type("Enter", "Redis is back")
    eventually(lambda: '"pass"' in browser.get("/govredis/ready").text)
    assert "Hello olga" in browser.get("/").text
