// Runs calls of the vendor's Node SDK, @alicloud/log, for test_foreign_clients.py.
//
// The first argument is a JSON document: what to make the client of, the port on the loopback interface where all hosts
// are, and the calls, each [method, arguments...]. A {"seconds": n} among the arguments stands for a Date. Prints a JSON
// list with {"answer": ...} or {"error": {code, message, requestid}} for each call.
'use strict';

require('./loopback');

const Client = require('@alicloud/log');

const revive = (key, value) =>
  value && typeof value === 'object' && 'seconds' in value ? new Date(value.seconds * 1000) : value;

async function main() {
  const { settings, calls } = JSON.parse(process.argv[2], revive);
  const client = new Client(settings);
  const outcomes = [];
  for (const [method, ...parameters] of calls) {
    try {
      outcomes.push({ answer: await client[method](...parameters) });
    } catch (error) {
      outcomes.push({ error: { code: error.code, message: error.message, requestid: error.requestid } });
    }
  }
  process.stdout.write(JSON.stringify(outcomes));
  process.exit(0); // its agent would keep connections, and so the process, alive
}

main();
