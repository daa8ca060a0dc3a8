// For the other scripts here, whose endpoints are no hosts that exist, and whose SDKs know no proxies: names lead to the
// service on the loopback interface.
'use strict';

const dns = require('dns');

dns.lookup = (host, options, callback) => {
  if (typeof options === 'function') {
    callback = options;
    options = {};
  }
  process.nextTick(() => {
    if (options && options.all) {
      callback(null, [{ address: '127.0.0.1', family: 4 }]);
    } else {
      callback(null, '127.0.0.1', 4);
    }
  });
};
