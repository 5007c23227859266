// Swagger UI over this server's own document.
window.ui = SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
  // With a key set, a login of the pages is a cookie; requests that change something need its token.
  requestInterceptor: (request) => {
    const token = document.querySelector('meta[name="csrf"]')?.content;
    if (token) request.headers["X-CSRF-Token"] = token;
    return request;
  },
});
